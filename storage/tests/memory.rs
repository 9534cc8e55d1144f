//! How much memory the simultaneous first contact of many clusters takes. This test is alone in its process, because it
//! measures the peak of the whole process.

use klio_storage::{
    disk::RealDisk,
    repository::{LocalFiles, Repository, Secret, Settings},
};
use std::{fs, sync::Arc};

/// scrypt for stock restic's password takes 128 MiB for each derivation.
const ONE: u64 = 128 << 20;
const CLUSTERS: usize = 12;

/// Physical memory in bytes: `VmRSS` is the current value, `VmHWM` the peak since the last reset.
fn memory(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find(|line| line.starts_with(field)).expect("the field");
    let kib = line.split_whitespace().nth(1).expect("a number");
    kib.parse::<u64>().expect("KiB") << 10
}

/// Before, twelve new clusters took 1.3 GB.
#[test]
fn many_new_repositories_at_once_take_the_memory_of_one_derivation() {
    let directory = tempfile::tempdir().unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = memory("VmRSS");
    std::thread::scope(|scope| {
        for number in 0..CLUSTERS {
            let place = directory.path().join(number.to_string());
            scope.spawn(move || {
                let files = LocalFiles::new(Arc::new(RealDisk), place);
                let secret = Secret::generate();
                Repository::create(Arc::new(files), &secret, &Settings::default()).unwrap();
            });
        }
    });
    let most = memory("VmHWM") - before;
    assert!(most >= ONE / 2, "nothing was derived: {most}");
    assert!(most < 2 * ONE, "{most} bytes for {CLUSTERS} clusters at once");
}
