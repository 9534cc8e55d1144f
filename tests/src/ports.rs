//! Free loopback ports.
//!
//! A port is never handed out twice while this process lives, nor to another process using this module (a lock file for
//! each). They lie below Linux's ephemeral range (32768 and up), so that no outgoing connection takes one in between.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::PathBuf,
    sync::Mutex,
};

const FIRST: u16 = 10_000;
const LAST: u16 = 32_000;

/// The locks of all ports handed out; they are released when the process ends.
static TAKEN: Mutex<Vec<(u16, File)>> = Mutex::new(Vec::new());

/// A port of 127.0.0.1 on which nobody listens.
///
/// # Panics
/// When none is left.
#[must_use]
pub fn free() -> u16 {
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for _ in 0..1000 {
        let port = rand::random_range(FIRST..LAST);
        if taken.iter().any(|(p, _)| *p == port) {
            continue;
        }
        let Some(lock) = lock(port) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            taken.push((port, lock));
            return port;
        }
    }
    panic!("find a free port: none between {FIRST} and {LAST} in 1000 tries");
}

fn lock(port: u16) -> Option<File> {
    let user = rustix::process::geteuid().as_raw();
    let dir = PathBuf::from(format!("/tmp/klio-ports-{user}"));
    fs::create_dir_all(&dir).ok()?;
    let file = File::create(dir.join(port.to_string())).ok()?;
    file.try_lock().ok()?;
    Some(file)
}
