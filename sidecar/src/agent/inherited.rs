//! Closes the file descriptors that a child inherits from PostgreSQL.
//!
//! PostgreSQL 15 opens its files without O_CLOEXEC, so restore_command inherits them. A resident program that kept
//! them open would keep the disk space of dropped tables from being freed.

use std::os::fd::{FromRawFd, OwnedFd};

/// Closes every descriptor except stdin, stdout and stderr. A program that was started as an agent calls this first
/// in `main`.
pub fn close_inherited() {
    let Ok(directory) = std::fs::read_dir("/proc/self/fd") else { return };
    // Collected first: the list contains the descriptor of the directory itself, which is closed by the time of the
    // loop.
    let open: Vec<i32> = directory
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        if rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new()).is_ok() {
            #[allow(unsafe_code, reason = "no safe interface closes a descriptor by number")]
            // SAFETY: nothing in this program owns a descriptor yet; this one is open, and it is closed exactly once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
