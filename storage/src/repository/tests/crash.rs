//! REPO1: a crash anywhere leaves a file complete or absent, and durable once `write` has returned.

use super::*;
use crate::{
    disk::{Restart, SimDisk},
    sum::Sha256Sum,
};

fn pack(seed: u64) -> (BaseFile, Vec<u8>) {
    let bytes = noise(seed, 5000);
    (BaseFile { kind: BaseKind::Data, id: Sha256Sum::of(&bytes) }, bytes)
}

/// Writes two files that may share directories; returns which were acknowledged.
fn work(disk: &SimDisk, packs: &[(BaseFile, Vec<u8>)]) -> Vec<bool> {
    let files = LocalFiles::new(Arc::new(disk.clone()), "/pg-1/base".into());
    packs.iter().map(|(file, bytes)| files.write(*file, &[bytes.clone().into()]).is_ok()).collect()
}

fn disk(seed: u64) -> SimDisk {
    use crate::disk::{Disk, durable};
    let disk = SimDisk::new(seed);
    assert!(disk.list(Path::new("/")).is_ok());
    durable::create_dir(&disk, Path::new("/pg-1")).unwrap();
    disk
}

#[test]
fn a_crash_at_any_step_leaves_files_whole_or_absent() {
    let packs: Vec<_> = (0..3).map(pack).collect();
    let mut all_done = false;
    for crash in 0..60 {
        for seed in 0..15 {
            let disk = disk(seed);
            disk.crash_after(crash);
            let done = work(&disk, &packs);
            all_done |= done.iter().all(|&d| d);
            disk.restart(Restart::PowerLoss);
            let files = LocalFiles::new(Arc::new(disk.clone()), "/pg-1/base".into());
            let listed = files.list(BaseKind::Data).unwrap();
            for ((file, bytes), done) in packs.iter().zip(done) {
                let is_listed = listed.contains(&(*file, 5000));
                match files.read(*file) {
                    Ok(found) => assert!(found == *bytes && is_listed, "crash {crash} seed {seed}"),
                    Err(_) => assert!(!done && !is_listed, "lost: crash {crash} seed {seed}"),
                }
            }
            // The rest of unfinished files is in nobody's way, and is removed.
            assert_eq!(work(&disk, &packs), [true; 3], "crash {crash} seed {seed}");
            files.sweep().unwrap();
            assert_eq!(files.list(BaseKind::Data).unwrap().len(), 3);
        }
    }
    assert!(all_done, "no run reached its end");
}

#[test]
fn sweep_removes_unfinished_files_and_nothing_else() {
    let home = home();
    let (file, bytes) = pack(1);
    home.files.write(file, &[bytes.into()]).unwrap();
    let before: Vec<_> = BaseKind::ALL.iter().map(|kind| home.files.list(*kind).unwrap()).collect();
    let left = home.files.path(file).with_extension("123.4.tmp");
    std::fs::write(&left, b"half").unwrap();
    let config = home.files.path(BaseFile::CONFIG).with_extension("9.9.tmp");
    std::fs::write(&config, b"half").unwrap();
    home.files.sweep().unwrap();
    assert!(!left.exists() && !config.exists());
    let after: Vec<_> = BaseKind::ALL.iter().map(|kind| home.files.list(*kind).unwrap()).collect();
    assert_eq!(after, before);
}

#[test]
fn a_failed_fsync_or_a_full_disk_is_an_error_and_leaves_no_file() {
    for fail in 0..12 {
        let disk = disk(fail);
        disk.fail_sync_after(fail);
        let packs = [pack(1)];
        let done = work(&disk, &packs);
        disk.restart(Restart::PowerLoss);
        let files = LocalFiles::new(Arc::new(disk.clone()), "/pg-1/base".into());
        assert!(!done[0] || files.read(packs[0].0).is_ok());
        assert_eq!(work(&disk, &packs), [true]);
    }
}
