//! P10: without Klio, stock restic opens, checks and restores the repository.

use super::*;
use std::process::{Command, Output};

/// Uses Debian's restic; if it is missing, the test fails, as with everything else that tests need.
fn restic(home: &Home, arguments: &[&str]) -> Output {
    let output = Command::new("restic")
        .arg("--repo")
        .arg(home.directory.path().join("base"))
        .arg("--no-cache")
        .args(arguments)
        .env("RESTIC_PASSWORD", home.secret.password.as_str())
        .output()
        .expect("restic is installed (Debian package restic)");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "restic {arguments:?}: {text}");
    output
}

/// A real directory as a source.
struct Directory(PathBuf);

impl Source for Directory {
    fn listing_began(&self) -> SystemTime {
        SystemTime::now()
    }
    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        let mut found = Vec::new();
        walk(&self.0, Path::new(""), &mut found);
        found.sort_by(|a: &SourceEntry, b| a.path.cmp(&b.path));
        Box::new(found.into_iter().map(Ok))
    }
}

fn walk(root: &Path, below: &Path, found: &mut Vec<SourceEntry>) {
    use std::os::unix::fs::MetadataExt;
    for entry in std::fs::read_dir(root.join(below)).unwrap() {
        let path = below.join(entry.unwrap().file_name());
        let full = root.join(&path);
        let metadata = full.symlink_metadata().unwrap();
        let (uid, gid, mode) = (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777);
        let mtime = metadata.modified().unwrap();
        let kind = if metadata.is_dir() {
            EntryKind::Dir
        } else if metadata.is_symlink() {
            EntryKind::Symlink(std::fs::read_link(&full).unwrap())
        } else {
            let open = move || Ok(Box::new(std::fs::File::open(full)?) as Box<dyn Read + Send>);
            EntryKind::File { size: metadata.len(), open: Box::new(open) }
        };
        found.push(SourceEntry { path: path.clone(), kind, mode, uid, gid, mtime, ctime: mtime });
        if metadata.is_dir() {
            walk(root, &path, found);
        }
    }
}

fn real_tree(root: &Path) {
    std::fs::create_dir_all(root.join("data/base/1")).unwrap();
    std::fs::create_dir_all(root.join("data/pg_tblspc")).unwrap();
    std::fs::create_dir_all(root.join("tablespaces/16384/PG_17")).unwrap();
    let write = |path: &str, bytes: &[u8]| std::fs::write(root.join(path), bytes).unwrap();
    write("data/PG_VERSION", b"17\n");
    write("data/base/1/1259", &noise(1, 3 << 20));
    write("data/base/1/1260", &vec![0; 1 << 20]);
    write("data/base/1/empty", b"");
    write("data/base/1/odd name\"\\\u{e4}", &noise(2, 12_345));
    write("tablespaces/16384/PG_17/1", &noise(3, 100_000));
    std::os::unix::fs::symlink("/srv/space", root.join("data/link")).unwrap();
}

#[test]
fn stock_restic_checks_and_restores_what_klio_wrote() {
    let home = home();
    let root = home.directory.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    real_tree(&root);
    let first = home.repository.snapshot(&Directory(root.clone()), None, Arc::new(Silent)).unwrap();
    // The second part adds files to a directory of the first part, and a directory of its own.
    let late =
        Fake::new().file("data/backup_label", b"START").file("data/global/pg_control", b"control");
    let second = home.repository.snapshot(&late, None, Arc::new(Silent)).unwrap();
    let summary = home.repository.assemble(&[first, second], &meta("one")).unwrap();

    restic(&home, &["check", "--read-data"]);
    let listed = restic(&home, &["snapshots", "--json"]).stdout;
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed[0]["id"], summary.id.to_string());
    assert_eq!((&listed[0]["hostname"], &listed[0]["tags"][0]), (&"pg-1".into(), &"one".into()));

    let target = home.directory.path().join("restored");
    restic(&home, &["restore", &summary.id.to_string(), "--target", target.to_str().unwrap()]);
    std::fs::write(root.join("data/backup_label"), b"START").unwrap();
    std::fs::create_dir(root.join("data/global")).unwrap();
    std::fs::write(root.join("data/global/pg_control"), b"control").unwrap();
    let diff = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([&root, &target])
        .output()
        .unwrap();
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
}

#[test]
fn stock_restic_agrees_after_maintenance_and_after_packs_were_put_back() {
    let home = home();
    let tree =
        |seed| Fake::new().file("data/a", &noise(1, 1 << 20)).file("data/b", &noise(seed, 2 << 20));
    let (_, old) = back_up(&home.repository, &tree(5), None, "old");
    back_up(&home.repository, &tree(6), Some(&old), "new");
    home.repository.forget(&[old.id]).unwrap();
    let part = home.repository.snapshot(&tree(5), None, Arc::new(Silent)).unwrap();
    home.repository.prune(Duration::ZERO).unwrap();
    home.repository.assemble(&[part], &meta("again")).unwrap();
    restic(&home, &["check", "--read-data"]);
    home.repository.prune(Duration::ZERO).unwrap();
    home.repository.prune(Duration::ZERO).unwrap();
    restic(&home, &["check", "--read-data"]);
}
