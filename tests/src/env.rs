//! The environment of a test run, read here and nowhere else.
//!
//! `KLIO_BIN_DIR`: where Klio's programs are. `KLIO_TEST_DIR`: where scratch directories go. `KLIO_TEST_SEED`: the choices of
//! tests that kill at random moments; the same seed makes the same choices, and only the machine's timing differs.

use std::{ffi::OsString, path::PathBuf};

fn path(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// `KLIO_BIN_DIR`, when the programs under test are not those of this build.
#[must_use]
pub fn bin_dir() -> Option<PathBuf> {
    path("KLIO_BIN_DIR")
}

/// Where scratch directories go: `KLIO_TEST_DIR`, else `/tmp` (short, because a socket's path may have 107 bytes only).
#[must_use]
pub fn scratch_root() -> PathBuf {
    path("KLIO_TEST_DIR").unwrap_or_else(|| PathBuf::from("/tmp"))
}

/// Debian's library that gives a program a clock of its own.
///
/// # Panics
/// When it is not installed.
#[must_use]
pub fn faketime() -> PathBuf {
    let directories = std::fs::read_dir("/usr/lib").expect("read /usr/lib").flatten();
    let library =
        |directory: std::fs::DirEntry| directory.path().join("faketime/libfaketimeMT.so.1");
    let found = directories.map(library).find(|library| library.is_file());
    found.expect("find libfaketimeMT.so.1: hint: run `make tools`")
}

/// `KLIO_TEST_SEED`, else 1: a run without a wish of its own can be repeated. It is printed, for the log of a failure.
///
/// # Panics
/// When the variable is no number.
#[must_use]
pub fn seed() -> u64 {
    let text = std::env::var_os("KLIO_TEST_SEED").filter(|v| !v.is_empty());
    let seed = text.map_or(1, |text| {
        let number = text.to_str().and_then(|text| text.parse().ok());
        number.unwrap_or_else(|| panic!("KLIO_TEST_SEED: expected a number, found {text:?}"))
    });
    println!("KLIO_TEST_SEED={seed}");
    seed
}

/// The root of this repository, as it was when the tests were built.
#[must_use]
pub fn repository() -> PathBuf {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    tests.parent().map_or(tests.clone(), PathBuf::from)
}

/// The `cargo` that runs the tests, else the one on `PATH`.
#[must_use]
pub fn cargo() -> PathBuf {
    path("CARGO").unwrap_or_else(|| PathBuf::from("cargo"))
}

/// `.tools/bin`, where `make tools` puts programs, then the directories of `PATH`.
fn search_dirs() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(repository().join(".tools/bin")).chain(std::env::split_paths(&path)).collect()
}

/// `PATH` for programs under test: with `.tools/bin` in front.
///
/// # Panics
/// When the path of the repository holds a colon.
#[must_use]
pub fn search_path() -> OsString {
    std::env::join_paths(search_dirs()).expect("no colon in the path of the repository")
}

/// Finds a tool in `.tools/bin` or on `PATH`.
///
/// # Panics
/// When it is in neither.
#[must_use]
pub fn tool(name: &str) -> PathBuf {
    search_dirs().into_iter().map(|dir| dir.join(name)).find(|file| file.is_file()).unwrap_or_else(
        || panic!("find {name}: neither in .tools/bin nor on PATH; hint: run `make tools`"),
    )
}
