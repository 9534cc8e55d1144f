//! One run of the nats-server program: writes its configuration, starts it, finds its port, and stops it.
//!
//! CHILD1  it listens on loopback only, on a port that the kernel chose, with credentials made for this run.
//! CHILD2  it dies with us: the kernel kills it when the thread that forked it ends (PR_SET_PDEATHSIG is tied to the
//!     thread). It is therefore forked by a thread that lives as long as the queue.
//! CHILD3  a process that survived anyway (under a debugger, or where the kernel does not support the signal) is found by its pid file and ended before the
//!     next one opens the same files.

use super::Error;
use rand::distr::{Alphanumeric, SampleString};
use rustix::process::{Pid, Signal};
use std::{
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStderr, Command},
    sync::oneshot,
    time::Instant,
};

/// Recovering a large store takes time; a program that is not ready after this is broken.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// The time after SIGTERM. Every message is synced before it is acknowledged, so SIGKILL loses nothing either.
const STOP_WITHIN: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// The passwords for connecting: generated for one run, and on disk only in a file of mode 0600.
pub(super) struct Credentials {
    pub(super) password: String,
    pub(super) system_password: String,
}

impl Credentials {
    pub(super) fn random() -> Self {
        // ThreadRng is a cryptographic generator seeded by the operating system.
        let secret = || Alphanumeric.sample_string(&mut rand::rng(), 40);
        Self { password: secret(), system_password: secret() }
    }
}

/// User of the jobs' account.
pub(super) const USER: &str = "klio";
/// User of the system account, used only to ask the server for its settings.
pub(super) const SYSTEM_USER: &str = "klio-system";

/// The directory that nats-server creates in its `store_dir`.
pub(super) const STORE: &str = "jetstream";

/// The configuration file of one run.
pub(super) fn render(directory: &Path, max_bytes: u64, credentials: &Credentials) -> String {
    // JSON strings are valid strings of the NATS configuration format.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let path = |path: &Path| quoted(&path.to_string_lossy());
    format!(
        "# Written by klio-server at every start; changes are lost.\n\
         host: \"127.0.0.1\"\n\
         port: -1\n\
         server_name: \"klio\"\n\
         ports_file_dir: {directory}\n\
         max_payload: 64KB\n\
         max_connections: 256\n\
         jetstream {{\n\
         \x20 store_dir: {store}\n\
         \x20 sync_interval: always\n\
         \x20 max_memory_store: 1MB\n\
         \x20 max_file_store: {max_file}\n\
         }}\n\
         accounts {{\n\
         \x20 KLIO {{ users: [ {{ user: \"{USER}\", password: {password} }} ], jetstream: enabled }}\n\
         \x20 SYS {{ users: [ {{ user: \"{SYSTEM_USER}\", password: {system} }} ] }}\n\
         }}\n\
         system_account: SYS\n",
        directory = path(directory),
        store = path(directory),
        // The limit of the stream applies; that of the server leaves room for its own files.
        max_file = max_bytes.saturating_mul(2),
        password = quoted(&credentials.password),
        system = quoted(&credentials.system_password),
    )
}

/// Refuses a program that is not nats-server 2.12 or newer.
pub(super) async fn check_version(executable: &Path) -> Result<(), Error> {
    let output = Command::new(executable).arg("--version").stdin(Stdio::null()).output();
    let output = output.await.map_err(Error::file("run", executable))?;
    let found = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match version(&found) {
        Some(version) if version >= (2, 12) => Ok(()),
        _ => Err(Error::Version { path: executable.to_owned(), found }),
    }
}

/// `2.15` from `nats-server: v2.15.1` or `2.15.1`.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let text = text.strip_prefix("nats-server: v").unwrap_or(text);
    let mut parts = text.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

type Reply = oneshot::Sender<io::Result<Child>>;

/// The thread that forks (CHILD2). It ends when the last handle is dropped.
pub(super) struct Forker {
    requests: std::sync::mpsc::SyncSender<(Command, Reply)>,
}

impl Forker {
    pub(super) fn start() -> Result<Self, Error> {
        let (requests, inbox) = std::sync::mpsc::sync_channel::<(Command, Reply)>(1);
        let runtime = tokio::runtime::Handle::current();
        let thread = std::thread::Builder::new().name("nats-parent".into());
        thread
            .spawn(move || {
                let _runtime = runtime.enter();
                while let Ok((mut command, reply)) = inbox.recv() {
                    // If nobody waits for it, the child is dropped, which kills it.
                    let _ = reply.send(command.spawn());
                }
            })
            .map_err(Error::file("start thread", "nats-parent"))?;
        Ok(Self { requests })
    }

    async fn spawn(&self, command: Command) -> io::Result<Child> {
        let gone = || io::Error::other("the forking thread is gone");
        let (reply, answer) = oneshot::channel();
        self.requests.try_send((command, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A running program.
pub(super) struct Running {
    child: Child,
    pid: Pid,
    directory: PathBuf,
    pub(super) url: String,
}

fn config_path(directory: &Path) -> PathBuf {
    directory.join("nats.conf")
}
fn pid_path(directory: &Path) -> PathBuf {
    directory.join("nats.pid")
}

/// Starts the program and waits until it listens. `log` receives its standard error.
pub(super) async fn start(
    forker: &Forker,
    executable: &Path,
    directory: &Path,
    max_bytes: u64,
    credentials: &Credentials,
    log: impl FnOnce(ChildStderr),
) -> Result<Running, Error> {
    end_stale(directory).await?;
    remove_ports_files(directory);
    let config = config_path(directory);
    write_private(&config, &render(directory, max_bytes, credentials))?;
    let mut child = forker
        .spawn(command(executable, &config))
        .await
        .map_err(Error::file("start", executable))?;
    if let Some(stderr) = child.stderr.take() {
        log(stderr);
    }
    let pid = child.id().and_then(|id| Pid::from_raw(id as i32));
    let pid = pid.ok_or_else(|| Error::Child("it ended at once".into()))?;
    write_private(&pid_path(directory), &format!("{pid}\n"))?;
    let mut running = Running { child, pid, directory: directory.to_owned(), url: String::new() };
    running.url = running.wait_for_port().await?;
    Ok(running)
}

fn command(executable: &Path, config: &Path) -> Command {
    let mut command = Command::new(executable);
    command
        .arg("-c")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A process group of its own, so that Ctrl-C in a terminal does not stop it before our shutdown does.
        .process_group(0)
        .env("GOMEMLIMIT", "192MiB")
        .kill_on_drop(true);
    let parent = rustix::process::getpid();
    let with_parent = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before that call.
        match rustix::process::getppid() {
            Some(now) if now == parent => Ok(()),
            _ => Err(io::Error::from_raw_os_error(3)),
        }
    };
    // SAFETY: runs between fork and exec; it makes two system calls and neither allocates nor locks.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(with_parent);
    }
    command
}

impl Running {
    async fn wait_for_port(&mut self) -> Result<String, Error> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            if let Some(url) = read_ports(&self.directory, self.pid) {
                return Ok(url);
            }
            tokio::select! {
                ended = self.child.wait() => return Err(ended_early(ended)),
                () = tokio::time::sleep(POLL) => {}
            }
            if Instant::now() > deadline {
                self.kill().await;
                let detail = format!("not listening after {} s", READY_WITHIN.as_secs());
                return Err(Error::Child(detail));
            }
        }
    }

    /// Waits until the program ends by itself. Cancel-safe.
    pub(super) async fn ended(&mut self) -> Error {
        ended_early(self.child.wait().await)
    }

    /// Sends SIGTERM, and kills the program if it does not end in time.
    pub(super) async fn stop(mut self) {
        let _ = rustix::process::kill_process(self.pid, Signal::TERM);
        if tokio::time::timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            tracing::warn!("nats-server did not end in time; killing it");
            self.kill().await;
        }
        let _ = std::fs::remove_file(pid_path(&self.directory));
    }

    async fn kill(&mut self) {
        let _ = self.child.kill().await;
    }

    #[cfg(test)]
    pub(super) const fn pid(&self) -> Pid {
        self.pid
    }
}

fn ended_early(status: io::Result<std::process::ExitStatus>) -> Error {
    Error::Child(match status {
        Ok(status) => format!("it ended with {status}"),
        Err(error) => format!("cannot wait for it: {error}"),
    })
}

/// Forwards the program's log line by line until its end, because a closed pipe would kill the program.
pub(super) async fn forward_log(stderr: ChildStderr) {
    let mut lines = BufReader::new(stderr).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line);
        let text = line.split_once("] ").map_or(&*line, |(_, text)| text);
        // The password is in a file of mode 0600, valid for this run and on loopback, so this warning does not apply.
        let expected = line.contains("Plaintext passwords detected");
        if line.contains("[ERR]") || line.contains("[FTL]") {
            tracing::error!(target: "nats_server", "{text}");
        } else if line.contains("[WRN]") && !expected {
            tracing::warn!(target: "nats_server", "{text}");
        } else {
            tracing::debug!(target: "nats_server", "{text}");
        }
    }
}

fn read_ports(directory: &Path, pid: Pid) -> Option<String> {
    // The file is named after the executable and the process.
    let suffix = format!("_{pid}.ports");
    let entries = std::fs::read_dir(directory).ok()?;
    let file = entries.flatten().find(|e| e.file_name().to_string_lossy().ends_with(&suffix))?;
    let ports: serde_json::Value =
        serde_json::from_slice(&std::fs::read(file.path()).ok()?).ok()?;
    ports.get("nats")?.get(0)?.as_str().map(str::to_owned)
}

fn remove_ports_files(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "ports") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    // Removed first, because the mode applies only to a file that is created.
    let _ = std::fs::remove_file(path);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let write = |mut file: std::fs::File| io::Write::write_all(&mut file, text.as_bytes());
    options.open(path).and_then(write).map_err(Error::file("write", path))
}

/// CHILD3: ends a program of an earlier run that still uses this directory.
async fn end_stale(directory: &Path) -> Result<(), Error> {
    let Ok(text) = std::fs::read_to_string(pid_path(directory)) else { return Ok(()) };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(()) };
    if !uses(pid, directory) {
        return Ok(()); // ended, or the number belongs to somebody else now
    }
    tracing::warn!(%pid, "a nats-server of an earlier run is still running; stopping it");
    let deadline = Instant::now() + STOP_WITHIN;
    let _ = rustix::process::kill_process(pid, Signal::TERM);
    while uses(pid, directory) {
        if Instant::now() > deadline {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        if Instant::now() > deadline + STOP_WITHIN {
            return Err(Error::Child(format!(
                "cannot stop a process of an earlier run, pid {pid}"
            )));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

fn uses(pid: Pid, directory: &Path) -> bool {
    // The command line of a zombie is empty.
    let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let config = config_path(directory);
    line.split(|b| *b == 0).any(|word| word == config.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_it_prints() {
        assert_eq!(version("nats-server: v2.15.1"), Some((2, 15)));
        assert_eq!(version("2.9.10"), Some((2, 9)));
        assert_eq!(version("2.12-preview"), Some((2, 12)));
        assert_eq!(version("bash: not found"), None);
    }

    /// Guards against a bug of other projects, whose queue listens on all addresses without authentication.
    #[test]
    fn the_configuration_is_loopback_with_credentials_and_syncs_always() {
        let text = render(Path::new("/d/a \"b"), 1 << 20, &Credentials::random());
        assert!(text.contains("host: \"127.0.0.1\"\n"));
        assert!(text.contains("port: -1\n"));
        assert!(text.contains("sync_interval: always\n"));
        assert!(text.contains("store_dir: \"/d/a \\\"b\""));
        assert!(!text.contains("no_auth_user"));
        let other = render(Path::new("/d"), 1 << 20, &Credentials::random());
        assert_ne!(
            text.lines().find(|l| l.contains("KLIO")),
            other.lines().find(|l| l.contains("KLIO"))
        );
    }
}
