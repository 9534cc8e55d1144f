//! On the real disk.

use super::*;
use crate::disk::RealDisk;
use std::process::Command;

fn open(directory: &Path) -> WalStore {
    WalStore::open(Arc::new(RealDisk), directory.join("tier1"), WalOptions::default()).unwrap()
}

/// P10: a sealed file is a standard zstd file; `zstd -d` gives the segment.
#[test]
fn zstd_itself_decodes_a_sealed_file_to_the_segment() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1);
    let store = open(directory.path());
    store.pin(&rig.name, rig.wal.pinned()).unwrap();
    let mut writer = rig.writer(&store, 1, MIB);
    // Small raw batches, large compressed ones, and one across the end of a segment.
    for end in [100, 8292, 8300, 30_000, 600_000, 601_000, MIB - 5, MIB + 200_000] {
        rig.append_and_flush(&mut writer, MIB + end);
    }
    drop(writer);
    store.put_history(&rig.name, tli(2), &timeline::child().0).unwrap();
    let gap =
        GapDeclaration { from: at(2 * MIB + 200_000), to: at(3 * MIB), reason: "promoted".into() };
    let request = OpenRequest { gap: Some(gap), ..Rig::request(2, 3 * MIB) };
    let mut writer = store.open_writer(&rig.name, &request).unwrap();
    timeline::append_child(&rig, &mut writer, 3 * MIB + 1).unwrap();
    writer.flush().unwrap();
    let cases = [
        (WalFile::Segment(segment(1, 1)), rig.bytes(MIB, 2 * MIB)),
        (WalFile::Partial(segment(1, 2)), rig.bytes(2 * MIB, 2 * MIB + 200_000)),
    ];
    for (file, expected) in cases {
        let sealed = store.seal(&rig.name, file).unwrap();
        let Found::Stored { path, size, .. } = store.read(&rig.name, file).unwrap() else {
            panic!("expected a stored file");
        };
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
        let output = Command::new("zstd").arg("-dc").arg(&path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == expected);
        let test = Command::new("sha256sum").arg(&path).output().unwrap();
        let hex: String = sealed.sha256.iter().map(|b| format!("{b:02x}")).collect();
        assert!(String::from_utf8_lossy(&test.stdout).starts_with(&hex));
    }
}

#[test]
fn a_restart_on_the_real_disk_resumes_exactly_and_refuses_a_second_server() {
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1);
    let store = open(directory.path());
    store.pin(&rig.name, rig.wal.pinned()).unwrap();
    let mut writer = rig.writer(&store, 1, MIB);
    rig.append_and_flush(&mut writer, 3 * MIB + 12_345);
    let second =
        WalStore::open(Arc::new(RealDisk), directory.path().join("tier1"), WalOptions::default());
    assert_eq!(second.unwrap_err().kind, Kind::Conflict);
    drop((writer, store));
    let store = open(directory.path());
    assert_eq!(store.positions(&rig.name)[0].flushed, at(3 * MIB + 12_345));
    rig.check_readable(&store, &root_history());
    let (free, total) = store.free_space().unwrap();
    assert!(free > 0 && total >= free);
}

/// A thousand mostly idle clusters fit in one server. Measured in a separate process, because other tests of this
/// program use memory as well.
#[test]
fn an_idle_writer_takes_little_memory() {
    const ALONE: &str = "KLIO_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "wal::tests::real::an_idle_writer_takes_little_memory";
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--exact", name]).env(ALONE, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let rss = || -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let directory = tempfile::tempdir().unwrap();
    let rig = Rig::new(1);
    let options = WalOptions { preallocate: 4096, ..WalOptions::default() };
    let store =
        WalStore::open(Arc::new(RealDisk), directory.path().join("tier1"), options).unwrap();
    let open = |n: usize| {
        let name: ClusterName = format!("c{n}").parse().unwrap();
        store.pin(&name, rig.wal.pinned()).unwrap();
        let mut writer = store.open_writer(&name, &Rig::request(1, MIB)).unwrap();
        writer.append(at(MIB), &rig.bytes(MIB, MIB + 50_000)).unwrap();
        writer.flush().unwrap();
        writer
    };
    let mut writers: Vec<Writer> = (0..20).map(&open).collect();
    let before = rss();
    writers.extend((20..220).map(&open));
    let each = rss().saturating_sub(before) / 200;
    assert!(each < 64 << 10, "{each} bytes a writer");
}
