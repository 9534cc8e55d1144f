//! P11: what a person decided about a cluster's histories holds where tier 1 was set back, and nothing is decided on what it
//! has forgotten; two decisions that contradict each other are told, and neither is lost.

use klio_pg::Lsn;
use klio_proto::v1::{BeginGenerationRequest, wal_client::WalClient};
use klio_tests::{
    base_client::{Base, segment_size},
    client, install_crypto, programs,
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    wait::eventually,
};
use serde_json::Value;
use std::path::{Path, PathBuf};

const START: Lsn = Lsn::new(0x0100_0000);
const OTHER: u64 = 7_000_000_000_000_000_777;

struct Setup {
    site: Site,
    s3: S3,
    operator: PathBuf,
    /// Of before the first decision.
    old: Vec<u8>,
}

impl Setup {
    /// A cluster with a second, undecided history, that both tiers know of.
    async fn new() -> Self {
        install_crypto();
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        site.start().await;
        let channel = client::connect(&site, &site.bundle()).await.expect("connect");
        let base = Base::new(&channel, "main");
        drop(base.stream_wal(&channel, START, 8192).await);
        let begin = BeginGenerationRequest {
            cluster: "main".into(),
            system_identifier: OTHER,
            segment_size: segment_size().as_u32(),
            postgres_version: 150_018,
            writer_id: "another".into(),
        };
        let begun = WalClient::new(channel).begin_generation(begin).await.expect("begun");
        assert_eq!(begun.into_inner().number, 2);
        let operator = site.operator("ops").await;
        let mut setup = Self { site, s3, operator, old: Vec::new() };
        setup.wait_far("undecided").await;
        setup.old = std::fs::read(setup.near()).expect("the record");
        setup
    }

    fn near(&self) -> PathBuf {
        self.site.tier1().join("main/generations.json")
    }

    fn far(&self) -> PathBuf {
        self.s3.bucket_dir().join("klio/main/generations.json")
    }

    async fn wait_far(&self, word: &str) {
        eventually(&format!("{word} in the bucket"), PATIENCE, || async {
            let text = std::fs::read_to_string(self.far()).unwrap_or_default();
            if text.contains(&format!("\"{word}\"")) { Ok(()) } else { Err(text) }
        })
        .await;
    }

    async fn decide(&self, words: &[&str]) -> programs::Outcome {
        let words = [&["generation"], words].concat();
        let mut command = self.site.klio_command_of(&self.operator, None, &words);
        command.env("KLIO_CLUSTER", "main");
        programs::run(command).await
    }

    async fn states(&self) -> Vec<String> {
        let outcome = self.site.klio(None, &["generation", "list", "--json"]).await;
        let value: Value = serde_json::from_str(&outcome.stdout).unwrap_or_default();
        let all = value["generations"].as_array().cloned().unwrap_or_default();
        all.iter().map(|g| g["state"].as_str().unwrap_or_default().to_owned()).collect()
    }

    async fn wait_states(&self, expected: [&str; 2]) {
        eventually(&format!("{expected:?}"), PATIENCE, || async {
            let found = self.states().await;
            if found == expected { Ok(()) } else { Err(found) }
        })
        .await;
    }

    /// Tier 1's record is that of before again.
    async fn set_back(&mut self) {
        self.site.stop().await;
        put(&self.near(), &self.old);
    }
}

fn put(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_survives_a_tier_1_that_was_set_back_and_none_is_made_without_it() {
    let mut setup = Setup::new().await;
    assert_eq!(setup.decide(&["retire", "2"]).await.code, Some(0));
    setup.wait_far("retired").await;
    setup.set_back().await;
    setup.site.start().await;
    setup.wait_states(["current", "retired"]).await;
    // While the bucket does not say what was decided, nothing is.
    setup.set_back().await;
    setup.s3.faults().inject(Rule::always(Fault::Status(503)));
    setup.site.start().await;
    let refused = setup.decide(&["follow", "2"]).await;
    assert!(refused.code != Some(0) && refused.stderr.contains("tier 2"), "{refused:?}");
    setup.s3.faults().heal();
    setup.wait_states(["current", "retired"]).await;
    assert_eq!(setup.decide(&["follow", "2"]).await.code, Some(0), "a person may change it");
    setup.wait_far("older").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_decisions_that_know_nothing_of_each_other_are_told_and_both_records_stay() {
    let mut setup = Setup::new().await;
    assert_eq!(setup.decide(&["retire", "2"]).await.code, Some(0));
    setup.wait_far("retired").await;
    let retired = std::fs::read(setup.far()).expect("the record");
    // Somebody lost both copies of the decision, and decided anew.
    setup.set_back().await;
    let old = setup.old.clone();
    put(&setup.far(), &old);
    setup.site.start().await;
    assert_eq!(setup.decide(&["follow", "2"]).await.code, Some(0));
    setup.wait_far("older").await;
    setup.site.stop().await;
    put(&setup.far(), &retired);
    let near = std::fs::read(setup.near()).expect("the record");
    setup.site.start().await;
    eventually("the contradiction to be told", PATIENCE, || async {
        let said = setup.site.klio(None, &["status"]).await.stdout;
        if said.contains("expected one record to continue the other") { Ok(()) } else { Err(said) }
    })
    .await;
    let refused = setup.decide(&["follow", "1"]).await;
    assert!(
        refused.code != Some(0) && refused.stderr.contains("decision that generation"),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(setup.near()).expect("the record"), near);
    assert_eq!(std::fs::read(setup.far()).expect("the record"), retired);
}
