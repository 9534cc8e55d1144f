//! A copy of the cluster that is restored beside the living primary, promoted, and streams by mistake (P11).
//!
//! What must stay true: nothing that the copy writes is ever part of what is restored later, because nobody follows it, whether a
//! person has decided against it or nobody has decided yet.

use super::{
    Rig,
    restore::{Restored, Restorer, Source},
};
use crate::{
    postgres::Stop, process::Running, site::PATIENCE, timelines, wait::eventually_now,
    workload::Target,
};
use rand::{Rng, rngs::StdRng};

/// A copy that streams.
pub struct Copy {
    restored: Restored,
    stream: Running,
    timeline: u32,
}

impl Copy {
    /// Restores, starts and streams it; its first WAL is acknowledged, and it waits for a decision.
    pub(super) async fn make(rig: &Rig) -> Self {
        let restorer = Restorer::new(&rig.site, &rig.s3, Source::Server, rig.hands());
        let pg = restorer.files(&Target::Latest, None, &rig.maps_to("copy")).await;
        let restored = Restored::recover(pg, rig.checksums()).await;
        let timeline = restored.pg.timeline().await.get();
        let stream = rig.site.stream(&restored.pg);
        let end = restored.pg.write_wal(1 << 20).await;
        timelines::wait_line(&rig.site, timeline, "undecided", end).await;
        Self { restored, stream, timeline }
    }

    /// The copy writes on.
    pub(super) async fn write(&self) {
        self.restored.pg.write_wal(1 << 16).await;
    }

    /// It ends, decided or not; what is known of it is in the bucket.
    pub(super) async fn end(mut self, rig: &Rig, rng: &mut StdRng) -> &'static str {
        let retired = rng.random_bool(0.6);
        if retired {
            let operator = rig.site.operator("ops").await;
            let number = self.timeline.to_string();
            let outcome = timelines::decide(&rig.site, &operator, &["retire", &number]).await;
            assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
            let status = self.stream.wait_exit(PATIENCE).await;
            assert_eq!(
                status.code(),
                Some(26),
                "a retired copy streams on:\n{}",
                self.stream.log()
            );
        }
        self.stream.kill9_tree();
        self.restored.pg.stop(Stop::Immediate).await;
        let standing = if retired { "retired" } else { "undecided" };
        let record = rig.s3.bucket_dir().join("klio").join(rig.directory()).join("timelines.json");
        eventually_now("what is known of the copy in the bucket", PATIENCE, || {
            std::fs::read_to_string(&record).is_ok_and(|text| text.contains(standing))
        })
        .await;
        standing
    }
}
