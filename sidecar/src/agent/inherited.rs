//! Lets go of what PostgreSQL left open in its children.
//!
//! PostgreSQL 15 opens its files without O_CLOEXEC, so restore_command inherits them; a resident program would keep
//! the space of dropped tables.

use std::os::fd::{FromRawFd, OwnedFd};

/// Closes every descriptor but the standard ones. To be called first of all in `main`, by a program that was
/// started as an agent.
pub fn close_inherited() {
    let Ok(directory) = std::fs::read_dir("/proc/self/fd") else { return };
    // Collected first: the directory's own descriptor is among them, and is closed by then.
    let open: Vec<i32> = directory
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        if rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new()).is_ok() {
            #[allow(unsafe_code, reason = "no safe interface closes a descriptor by number")]
            // SAFETY: nothing in this program owns a descriptor yet; it is open, and it is closed once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
