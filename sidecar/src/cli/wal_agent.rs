//! `klio wal-agent`: the read-ahead agent as a process. It is not for people: `wal-fetch` starts it.
//!
//! There are two processes: one serves, the other waits for it and always ends with 0. If PostgreSQL is process 1, as
//! in many containers, orphaned processes become its children, and a child that was killed by a signal would make
//! PostgreSQL restart. The waiting process also removes what a killed one left behind.

use super::args::WalAgentArgs;
use crate::{
    agent::{self, Job},
    config::Config,
    error::Error,
};
use std::{
    ffi::OsString,
    process::{Command, Stdio},
};

const SERVE: &str = "--serve";
const SPOOL: &str = "--spool";

/// Whether this is the process that waits.
pub(super) fn is_outer(arguments: &[OsString]) -> bool {
    arguments.iter().all(|argument| argument != SERVE)
}

/// Starts the process that serves, and waits for its end.
pub(super) fn supervise(arguments: &[OsString]) -> u8 {
    agent::close_inherited();
    // Leaves PostgreSQL's process group, because PostgreSQL signals the whole group.
    let _ = rustix::process::setsid();
    let child = std::env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command.args(arguments.iter().skip(1)).arg(SERVE).stdin(Stdio::null());
        command.spawn()
    });
    match child.and_then(|mut child| child.wait()) {
        // If the process was killed, its files are left, and PostgreSQL needs the space.
        Ok(_) => {
            let mut words = arguments.iter();
            if words.any(|word| word == SPOOL)
                && let Some(spool) = words.next()
            {
                agent::remove_left(spool.as_ref());
            }
        }
        Err(error) => super::say(&format!("klio wal-agent: start: {error}")),
    }
    super::exit::OK
}

pub(super) async fn run(config: &Config, args: &WalAgentArgs) -> Result<u8, Error> {
    let job = Job {
        spool: args.spool.clone(),
        data_dir: args.data_dir.clone(),
        fingerprint: args.fingerprint.clone(),
    };
    agent::run(config, &job).await?;
    Ok(super::exit::OK)
}
