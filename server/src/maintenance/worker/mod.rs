//! The child process: `klio-server repository`, with a job on standard input. It is a hidden verb for the server only.
//!
//! It is a process of its own, so that the memory of a large index, and a panic, do not affect the server. It runs at
//! low priority (nice 10), and ends with the server: the end of standard input ends it at once, in the middle of its
//! work, and every step is written so that this is safe.

mod files;
mod orphans;
mod prune;
mod verify;
mod verify_wal;

use super::protocol::{Job, Line, Step, Work};
use anyhow::{Context, bail};
use klio_storage::{
    crypt::AtRest,
    disk::{Disk, RealDisk, read_small},
    layout::{BaseObject, ClusterName},
    repository::{
        BucketFiles, LocalFiles, SECRET_LIMIT_BYTES, Secret, decode_secret, secret_objects,
    },
    tier2::{Tier2, Tier2Config},
};
use std::{
    io::{self, BufRead, Read, Write},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::runtime::{Handle, Runtime};

/// The exit status when the pipe is broken, which means that the server is gone.
const EXIT_ORPHAN: i32 = 3;

/// How often a step that only reads reports that it is still running.
const STILL_EVERY: Duration = Duration::from_secs(10);

/// Writes lines to the server. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Output(Arc<Mutex<Told>>);

/// The last step that was reported, and when.
#[derive(Debug, Default)]
struct Told {
    at: Option<Instant>,
    step: Step,
}

impl Output {
    #[expect(clippy::unused_self, reason = "who has it may write")]
    fn say(&self, line: &Line) {
        let Ok(mut text) = serde_json::to_vec(line) else { return };
        text.push(b'\n');
        let mut out = io::stdout().lock();
        if out.write_all(&text).and_then(|()| out.flush()).is_err() {
            std::process::exit(EXIT_ORPHAN);
        }
    }

    fn progress(&self, step: Step) {
        *self.told() = Told { at: Some(Instant::now()), step: step.clone() };
        self.say(&Line::Progress(step));
    }

    /// Called when something was read: the step is still running. Reports the last step again, at most every
    /// [`STILL_EVERY`].
    fn still(&self) {
        let step = {
            let mut told = self.told();
            if told.at.is_some_and(|at| at.elapsed() < STILL_EVERY) {
                return;
            }
            told.at = Some(Instant::now());
            told.step.clone()
        };
        self.say(&Line::Progress(step));
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the work needs.
struct Ground {
    cluster: ClusterName,
    disk: Arc<dyn Disk>,
    /// Tier 1's directory.
    root: PathBuf,
    local: Arc<LocalFiles>,
    bucket: Option<Arc<BucketFiles>>,
    tier2: Option<Tier2>,
    at_rest: AtRest,
    runtime: Handle,
    out: Output,
}

/// What the configuration says, as far as the work needs it.
pub struct Given {
    /// The configuration file, for messages.
    pub file: PathBuf,
    pub data_dir: PathBuf,
    pub tier2: Option<Tier2Config>,
    pub at_rest: AtRest,
}

/// Reads the job from standard input, and writes what `answer` makes of it to standard output.
///
/// # Errors
/// Only errors from before the job was read.
pub fn serve(answer: impl FnOnce(Job, &Output) -> Line) -> anyhow::Result<()> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).context("read the job")?;
    let job: Job = serde_json::from_str(&line).context("read the job")?;
    std::thread::Builder::new()
        .name("parent".into())
        .spawn(|| {
            // Nothing more is sent; the pipe ends when the server stops, dies or drops the child.
            let _ = io::stdin().lock().read_to_end(&mut Vec::new());
            std::process::exit(EXIT_ORPHAN);
        })
        .context("watch the server")?;
    // Other processes come first. If the system does not allow it, the work is done anyway.
    let _ = rustix::process::nice(10);
    let out = Output::default();
    out.say(&answer(job, &out));
    Ok(())
}

/// Does a job.
///
/// # Errors
/// The configuration is not the one that the server runs with; or why the work failed.
pub fn work(given: Given, job: Job, runtime: &Runtime, out: &Output) -> anyhow::Result<Line> {
    let url = given.tier2.as_ref().map(|tier2| tier2.url.to_string());
    if given.data_dir != job.data_dir || url != job.tier2_url {
        bail!(
            "read configuration {}: data_dir or tier2.url is not what the server runs with; hint: restart klio-server",
            given.file.display()
        );
    }
    let tier2 = given.tier2.as_ref().map(Tier2::open).transpose().context("open tier 2")?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let root = given.data_dir.join("tier1");
    let base = root.join(job.cluster.as_str()).join("base");
    let handle = runtime.handle().clone();
    let bucket =
        tier2.clone().map(|t| Arc::new(BucketFiles::new(t, job.cluster.clone(), handle.clone())));
    let ground = Ground {
        local: Arc::new(LocalFiles::new(disk.clone(), base)),
        at_rest: given.at_rest,
        cluster: job.cluster,
        runtime: handle,
        disk,
        root,
        bucket,
        tier2,
        out: out.clone(),
    };
    Ok(match job.work {
        Work::Prune(job) => Line::Pruned(prune::run(&ground, &job)?),
        Work::Verify(job) => Line::Verified(verify::run(&ground, &job)?),
    })
}

impl Ground {
    /// The path of an object on tier 1.
    fn path(&self, object: &BaseObject) -> PathBuf {
        self.root.join(object.key(&self.cluster))
    }

    /// The secret of the repository, from tier 1 or else tier 2; `None` when there is no repository.
    fn secret(&self) -> Result<Option<Secret>, klio_storage::Error> {
        for object in secret_objects(&self.at_rest) {
            let encrypted = matches!(object, BaseObject::Secret { encrypted: true });
            let path = self.path(&object);
            // A damaged copy is reported by verification; the other tier's copy may still open the repository.
            if let Ok(bytes) = read_small(self.disk.as_ref(), &path, SECRET_LIMIT_BYTES)
                && let Ok(secret) = decode_secret(&bytes, encrypted, &self.at_rest, path.display())
            {
                return Ok(Some(secret));
            }
        }
        let Some(tier2) = &self.tier2 else { return Ok(None) };
        for object in secret_objects(&self.at_rest) {
            let encrypted = matches!(object, BaseObject::Secret { encrypted: true });
            let key = object.key(&self.cluster);
            let read = self.runtime.block_on(tier2.read_small(&key, SECRET_LIMIT_BYTES))?;
            if let Some(bytes) = read {
                return decode_secret(&bytes, encrypted, &self.at_rest, key).map(Some);
            }
        }
        Ok(None)
    }
}
