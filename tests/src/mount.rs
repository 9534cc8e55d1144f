//! A small file system that can be filled to the last byte: tmpfs. Needs root, as in CI and in a container.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A mounted tmpfs; unmounted when dropped.
pub struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts one of this many MiB on `dir`, which is made if need be.
    ///
    /// # Panics
    /// Without the right to mount.
    #[must_use]
    pub fn mount(dir: &Path, mebibytes: u32) -> Self {
        std::fs::create_dir_all(dir).expect("make the mount point");
        let size = format!("size={mebibytes}m,mode=0755");
        let outcome =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir).output();
        let outcome = outcome.expect("run mount");
        assert!(
            outcome.status.success(),
            "mount tmpfs on {}: {}; hint: this test needs root",
            dir.display(),
            String::from_utf8_lossy(&outcome.stderr)
        );
        Self { dir: dir.to_owned() }
    }

    /// Takes all space that is left.
    ///
    /// # Panics
    /// For anything but a full disk.
    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.ballast()).expect("make the ballast");
        let block = [0xAA; 4096];
        while std::io::Write::write_all(&mut file, &block).is_ok() {}
    }

    /// Gives the space back.
    ///
    /// # Panics
    /// When it was not filled.
    pub fn relieve(&self) {
        std::fs::remove_file(self.ballast()).expect("remove the ballast");
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a program that is only just ending may still have a file open.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}
