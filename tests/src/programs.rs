//! Klio's own programs, as built by `make build`.
//!
//! They are taken from the target directory of the running test (or `KLIO_BIN_DIR`), never from `PATH`.

use crate::{env, process::Running};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// From now on the programs of this directory are under test, whatever is built meanwhile.
pub fn use_from(directory: &Path) {
    CHOSEN.get_or_init(|| directory.to_owned());
}

fn find(name: &str) -> PathBuf {
    let dir = CHOSEN.get().cloned().or_else(env::bin_dir).unwrap_or_else(|| {
        let test = std::env::current_exe().expect("the path of the running test program");
        // target/debug/deps/test-1a2b -> target/debug; target/debug/klio-soak is there already.
        let dir = test.parent().expect("a program lies in a directory");
        let deps = dir.file_name().is_some_and(|name| name == "deps");
        dir.parent().filter(|_| deps).unwrap_or(dir).to_owned()
    });
    let program = dir.join(name);
    assert!(
        program.is_file(),
        "find program {name}: expected {}; hint: run `make build` first, or set KLIO_BIN_DIR",
        program.display()
    );
    program
}

/// Path of `klio-server`.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn klio_server() -> PathBuf {
    find("klio-server")
}

/// Path of `klio`.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn klio() -> PathBuf {
    find("klio")
}

/// A command for one of them with a clean environment: no variable of the tester's shell reaches it, except `PATH` with
/// `.tools/bin` in front (the server looks for nats-server there).
#[must_use]
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", env::search_path()).env("RUST_BACKTRACE", "1").current_dir("/");
    command
}

/// Starts `klio-server` with these arguments.
#[must_use]
pub fn start_klio_server(args: &[&str], log: &Path) -> Running {
    let mut command = command(&klio_server());
    command.args(args);
    Running::spawn("klio-server", command, log)
}

/// Starts `klio` with these arguments.
#[must_use]
pub fn start_klio(args: &[&str], log: &Path) -> Running {
    let mut command = command(&klio());
    command.args(args);
    Running::spawn("klio", command, log)
}

/// How a command that has ended went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a command to its end, off the async threads.
///
/// # Panics
/// When it cannot be started.
pub async fn run(mut command: Command) -> Outcome {
    let output = tokio::task::spawn_blocking(move || {
        let output = command.stdin(std::process::Stdio::null()).output();
        output.unwrap_or_else(|e| panic!("run {command:?}: {e}"))
    })
    .await
    .expect("the command's thread does not panic");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs `klio` with these arguments to its end.
pub async fn run_klio(args: &[&str]) -> Outcome {
    let mut command = command(&klio());
    command.args(args);
    run(command).await
}

#[cfg(test)]
mod tests {
    #[test]
    #[should_panic(expected = "hint: run `make build` first")]
    fn an_absent_program_says_how_to_build_it() {
        super::find("klio-absent");
    }
}
