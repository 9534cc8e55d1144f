//! Starts the child process for work on a repository, and reads its output.
//!
//! The child ends with its [`Child`], because the pipe to it closes and it is killed. A child that ends without a
//! result, or that reports no progress for [`SILENCE_MAX`], counts as an error, and its turn ends.

use super::{
    Inner,
    protocol::{Job, Line, PruneJob, PruneResult, Step, VerifyJob, VerifyResult, Work},
};
use klio_proto::Code;
use klio_storage::{
    catalog::{Damage, KnownDamage},
    layout::{BaseObject, ClusterName},
};
use std::{process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
};
use tonic::Status;
use tracing::{Instrument, field::Empty};

/// The child reports every file it reads, at most every ten seconds. Silence therefore means one very long step, such
/// as reading a pack over a very slow link, or sorting an index of many millions of chunks.
const SILENCE_MAX: Duration = Duration::from_secs(3600);

/// Receives reports of progress; never waits.
pub type Tell<'a> = &'a (dyn Fn(Step) + Send + Sync);

impl Inner {
    /// Removes what no backup needs.
    pub(super) async fn prune(
        &self,
        cluster: &ClusterName,
        job: PruneJob,
        tell: Tell<'_>,
    ) -> Result<PruneResult, Status> {
        let damaged = self.known_damage(cluster).await?.packs;
        let job = PruneJob { damaged: damaged.into_iter().map(|d| d.key).collect(), ..job };
        match self.child(cluster, Work::Prune(job), tell).await? {
            Line::Pruned(result) => {
                self.learn_bad(cluster, &result.bad).await?;
                Ok(result)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Records packs that a prune opened and found bad as damaged, like those that a verification finds.
    async fn learn_bad(&self, cluster: &ClusterName, bad: &[Damage]) -> Result<(), Status> {
        if bad.is_empty() {
            return Ok(());
        }
        let bad = bad.to_vec();
        let change = move |known: &mut KnownDamage| {
            known.packs.retain(|old| bad.iter().all(|new| new.key != old.key));
            known.packs.extend(bad);
        };
        let known = self.base.change_damage(cluster, change).await?;
        self.metrics.known(cluster, &known);
        Ok(())
    }

    /// Reads what is stored and checks it.
    pub(super) async fn read_back(
        &self,
        cluster: &ClusterName,
        job: VerifyJob,
        tell: Tell<'_>,
    ) -> Result<VerifyResult, Status> {
        match self.child(cluster, Work::Verify(job), tell).await? {
            Line::Verified(result) => Ok(result),
            other => Err(unexpected(&other)),
        }
    }

    async fn child(
        &self,
        cluster: &ClusterName,
        work: Work,
        tell: Tell<'_>,
    ) -> Result<Line, Status> {
        let span = tracing::info_span!(
            "maintenance.child",
            otel.kind = "client",
            otel.status_code = Empty,
            error.type = Empty,
            %cluster,
            process.executable.name = "klio-server",
        );
        let result = self.follow(cluster, work, tell).instrument(span.clone()).await;
        if let Err(status) = &result {
            span.record("otel.status_code", "ERROR");
            span.record("error.type", Code::of(status).name());
        }
        result
    }

    /// An error of the bucket is not an internal error.
    fn failed(&self, error: String) -> Status {
        let url = self.base.tier2().map(|tier2| tier2.url().trim_end_matches('/'));
        match url {
            Some(url) if error.contains(url) => {
                Code::Unavailable.status(format!("cannot use tier 2: {error}"))
            }
            _ => Code::Internal.status(error),
        }
    }

    async fn follow(
        &self,
        cluster: &ClusterName,
        work: Work,
        tell: Tell<'_>,
    ) -> Result<Line, Status> {
        let failed = |what: &str, e: std::io::Error| Code::Internal.status(format!("{what}: {e}"));
        let mut traceparent = String::new();
        klio_telemetry::propagate::inject(&mut |key, value| {
            if key == "traceparent" {
                traceparent = value;
            }
        });
        let job = Job {
            traceparent,
            cluster: cluster.clone(),
            data_dir: self.data_dir.clone(),
            tier2_url: self.base.tier2().map(|tier2| tier2.url().to_owned()),
            work,
        };
        let mut line = serde_json::to_vec(&job)
            .map_err(|e| Code::Internal.status(format!("write the job: {e}")))?;
        line.push(b'\n');
        let mut child = Command::new(&self.program)
            .arg("repository")
            .arg("--config")
            .arg(&self.config_path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| failed("start the child process", e))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Code::Internal.status("start the child process: it has no pipes"));
        };
        input.write_all(&line).await.map_err(|e| failed("give the job to the child", e))?;
        input.flush().await.map_err(|e| failed("give the job to the child", e))?;
        let mut lines = BufReader::new(output).lines();
        loop {
            let told = tokio::time::timeout(SILENCE_MAX, lines.next_line()).await;
            let told = told.map_err(|_| Code::Internal.status(silent()))?;
            let Some(text) = told.map_err(|e| failed("read the child", e))? else { break };
            let line: Line = serde_json::from_str(&text)
                .map_err(|e| Code::Internal.status(format!("read the child: {e}")))?;
            match line {
                Line::Progress(step) => tell(step),
                Line::Written { object, size } => {
                    if let Some(object) = BaseObject::parse_relative(&object) {
                        self.base.archives().proven(cluster, object, size);
                    }
                }
                Line::Removed { object } => {
                    if let Some(object) = BaseObject::parse_relative(&object) {
                        self.base.archives().removed(cluster, &object);
                    }
                }
                Line::Failed { error } => return Err(self.failed(error)),
                done @ (Line::Pruned(_) | Line::Verified(_)) => {
                    drop(input);
                    let _ = child.wait().await;
                    return Ok(done);
                }
            }
        }
        let status = child.wait().await.map_err(|e| failed("wait for the child", e))?;
        Err(Code::Internal.status(format!("the child process ended without a result: {status}")))
    }
}

fn silent() -> String {
    let seconds = SILENCE_MAX.as_secs();
    format!("the child process reported no progress for {seconds} s and was ended")
}

fn unexpected(line: &Line) -> Status {
    tracing::error!(?line, "unexpected answer from the maintenance process");
    Code::Internal.status("unexpected answer from the maintenance process")
}
