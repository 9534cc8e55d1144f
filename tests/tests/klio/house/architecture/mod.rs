//! The rules of the house that a program can check: who may depend on whom, headers, no ignored tests.
//!
//! A finding names the file or the edge. The checks themselves are checked on made-up input, so that they can fail.

mod references;
mod rooms;

use klio_tests::env;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Crate, and the crates of the house it may use. `tests` may look at all.
const EDGES: [(&str, &[&str]); 7] = [
    ("klio-pg", &[]),
    ("klio-telemetry", &[]),
    ("klio-proto", &["klio-pg"]),
    ("klio-storage", &["klio-pg"]),
    ("klio-server", &["klio-pg", "klio-telemetry", "klio-proto", "klio-storage"]),
    ("klio-sidecar", &["klio-pg", "klio-telemetry", "klio-proto", "klio-storage"]),
    ("klio-tests", &["klio-pg", "klio-telemetry", "klio-proto", "klio-storage"]),
];

/// Crate, and (beginnings of) crates of others it must not know: storage has no gRPC, NATS or exporter, proto no disk, pg is pure.
const FOREIGN: [(&str, &[&str]); 3] = [
    (
        "klio-pg",
        &["tokio", "tonic", "async-nats", "opentelemetry", "object_store", "reqwest", "tracing"],
    ),
    ("klio-storage", &["tonic", "async-nats", "opentelemetry", "prometheus", "axum"]),
    ("klio-proto", &["object_store", "rustix", "async-nats", "opentelemetry", "axum"]),
];

#[derive(Debug, Clone)]
struct Edge {
    from: String,
    to: String,
    dev: bool,
}

/// Direct dependencies of all crates of the workspace, from `cargo metadata`.
fn edges() -> Vec<Edge> {
    let output = Command::new(env::cargo())
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(env::repository())
        .output()
        .expect("run cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON");
    let mut edges = Vec::new();
    for package in metadata["packages"].as_array().expect("packages") {
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            edges.push(Edge {
                from: package["name"].as_str().expect("a name").to_owned(),
                to: dependency["name"].as_str().expect("a name").to_owned(),
                dev: dependency["kind"] == "dev",
            });
        }
    }
    edges
}

/// Why an edge is not allowed. Development dependencies count too inside the house: a test of `server` must not use `sidecar`.
fn fault(edge: &Edge) -> Option<String> {
    if edge.to.starts_with("klio-") {
        let Some((_, allowed)) = EDGES.iter().find(|(from, _)| *from == edge.from) else {
            return Some(format!("{}: a crate without a line in EDGES", edge.from));
        };
        return (!allowed.contains(&edge.to.as_str()))
            .then(|| format!("{} must not depend on {}", edge.from, edge.to));
    }
    let (_, banned) = FOREIGN.iter().find(|(from, _)| *from == edge.from)?;
    let hit = !edge.dev && banned.iter().any(|b| edge.to.starts_with(b));
    hit.then(|| format!("{} must not know {}", edge.from, edge.to))
}

#[test]
fn every_dependency_edge_is_an_allowed_one() {
    let edges = edges();
    for (from, _) in EDGES.iter().filter(|(from, _)| *from != "klio-pg") {
        assert!(edges.iter().any(|e| e.from == *from), "{from}: not found in the workspace");
    }
    let faults: Vec<String> = edges.iter().filter_map(fault).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_forbidden_edge_is_found() {
    let edge = |from: &str, to: &str, dev| Edge { from: from.into(), to: to.into(), dev };
    assert!(fault(&edge("klio-server", "klio-sidecar", true)).is_some());
    assert!(fault(&edge("klio-sidecar", "klio-server", false)).is_some());
    assert!(fault(&edge("klio-pg", "klio-storage", false)).is_some());
    assert!(fault(&edge("klio-storage", "opentelemetry_sdk", false)).is_some());
    assert!(fault(&edge("klio-new", "klio-pg", false)).is_some());
    assert!(fault(&edge("klio-server", "klio-storage", false)).is_none());
    assert!(fault(&edge("klio-pg", "tokio", true)).is_none());
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("read a directory of the repository") {
        let path = entry.expect("read a directory of the repository").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            rust_files(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// What is wrong with the text of a source file.
fn text_faults(text: &str) -> Vec<&'static str> {
    let mut faults = Vec::new();
    let header = text.lines().next().and_then(|line| line.strip_prefix("//!"));
    if header.is_none_or(|words| words.trim().is_empty()) {
        faults.push("expected `//!` and a purpose as the first line");
    }
    // In two pieces, so that this file does not find itself.
    let ignore = concat!("#[", "ignore");
    if text.lines().any(|line| line.trim_start().starts_with(ignore)) {
        faults.push("expected no ignored test");
    }
    faults
}

#[test]
fn every_source_file_has_a_header_and_no_test_is_ignored() {
    let mut files = Vec::new();
    rust_files(&env::repository(), &mut files);
    assert!(files.len() > 20, "found only {} source files", files.len());
    let mut faults = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("read a source file");
        faults.extend(text_faults(&text).iter().map(|f| format!("{}: {f}", file.display())));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_missing_header_and_an_ignored_test_are_found() {
    assert_eq!(text_faults("//! Purpose.\nfn f() {}\n").len(), 0);
    assert_eq!(text_faults("//! \nfn f() {}\n").len(), 1);
    assert_eq!(text_faults("fn f() {}\n").len(), 1);
    assert_eq!(text_faults("").len(), 1);
    assert_eq!(text_faults(concat!("//! P.\n    #[", "ignore]\n")).len(), 1);
}
