//! The order of the rooms (the modules directly below a crate's root), and circles of files within a room.
//!
//! Read from the source text: `use` trees, and paths that begin with `crate::`, `super::` or `self::`. Test modules do not
//! count, since a test may look at everything. A file's arrow to a module that contains it does not count either.

use klio_tests::env;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// Each crate with its rooms, top to bottom. A room may use only rooms that stand below it.
const ORDER: [(&str, &[&str]); 3] = [
    (
        "server",
        &[
            "main",
            "cli",
            "app",
            "config",
            "grpc",
            "status",
            "maintenance",
            "receive",
            "access",
            "seal",
            "fetch",
            "quota",
            "consumer",
            "base",
            "registry",
            "queue",
            "private",
            "metrics",
            "readers",
            "rot",
            "clock",
            "encryption",
            "admin",
            "errors",
        ],
    ),
    (
        "sidecar",
        &[
            "main",
            "cli",
            "admin",
            "agent",
            "restore",
            "backup",
            "wal_source",
            "bucket",
            "streamer",
            "server_link",
            "replication",
            "config",
            "schedule",
            "backoff",
            "conninfo",
            "error",
        ],
    ),
    (
        "storage",
        &[
            "repository",
            "tier2",
            "catalog",
            "wal",
            "generations",
            "timelines",
            "crypt",
            "layout",
            "record",
            "sum",
            "disk",
            "error",
            "crash",
        ],
    ),
];
/// The most files of a circle.
const CIRCLE_MAX: usize = 3;

type Module = Vec<String>;
type Arrows = BTreeMap<Module, BTreeSet<Module>>;

/// The modules of a crate with their text, without those that only tests have.
fn modules(name: &str) -> BTreeMap<Module, String> {
    let root = env::repository().join(name).join("src");
    let mut files = Vec::new();
    super::rust_files(&root, &mut files);
    let module = |file: &std::path::PathBuf| -> Option<(Module, String)> {
        let relative = file.strip_prefix(&root).ok()?.with_extension("");
        let mut parts: Module = relative.iter().map(|p| p.to_string_lossy().into_owned()).collect();
        if parts
            .iter()
            .any(|part| matches!(part.as_str(), "tests" | "testing" | "fake_server" | "lib"))
        {
            return None;
        }
        parts.pop_if(|last| last == "mod");
        Some((parts, fs::read_to_string(file).expect("read a source file")))
    };
    files.iter().filter_map(module).collect()
}

/// Without comments and without the test module at the end.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let line = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The paths of a `use` tree.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let words = |text: &str| -> Vec<String> {
        let text = text.split(" as ").next().unwrap_or_default();
        text.split("::").map(|word| word.trim().to_owned()).filter(|w| !w.is_empty()).collect()
    };
    let Some((before, rest)) = tree.split_once('{') else { return vec![words(tree)] };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let (mut parts, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, letter) in inner.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&inner[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&inner[from..]);
    let before = words(before);
    let full = |rest: Vec<String>| before.iter().cloned().chain(rest).collect();
    parts.into_iter().filter(|p| !p.trim().is_empty()).flat_map(expand).map(full).collect()
}

/// Every path that the text names and that may lead to a module of the same crate.
fn paths(code: &str) -> Vec<Vec<String>> {
    let tree =
        regex::Regex::new(r"(?m)^\s*(?:pub(?:\([^)]*\))?\s+)?use\s+([^;]+);").expect("a pattern");
    let inline = regex::Regex::new(r"\b(?:crate|super|self)(?:::\w+)+").expect("a pattern");
    let mut found: Vec<_> = tree.captures_iter(code).flat_map(|c| expand(&c[1])).collect();
    let rest = tree.replace_all(code, "");
    found.extend(inline.find_iter(&rest).flat_map(|m| expand(m.as_str())));
    found
}

/// The module that a path in `from` leads to.
fn target(all: &BTreeMap<Module, String>, from: &Module, path: &[String]) -> Option<Module> {
    let (mut place, mut rest) = (from.clone(), path);
    match rest.first()?.as_str() {
        "crate" => (place, rest) = (Vec::new(), &rest[1..]),
        "self" => rest = &rest[1..],
        "super" => {
            while rest.first().is_some_and(|word| word == "super") {
                place.pop();
                rest = &rest[1..];
            }
        }
        _ => {}
    }
    let longest = (0..=rest.len()).rev().map(|n| [&place[..], &rest[..n]].concat());
    longest.into_iter().find(|module| !module.is_empty() && all.contains_key(module))
}

fn arrows(all: &BTreeMap<Module, String>) -> Arrows {
    let mut arrows = Arrows::new();
    for (from, text) in all {
        for path in paths(&code(text)) {
            if let Some(to) = target(all, from, &path).filter(|to| !from.starts_with(to)) {
                arrows.entry(from.clone()).or_default().insert(to);
            }
        }
    }
    arrows
}

fn order_faults(name: &str, order: &[&str], arrows: &Arrows, all: &[Module]) -> Vec<String> {
    let floor = |module: &Module| order.iter().position(|room| *room == module[0]);
    let mut faults = Vec::new();
    for module in all.iter().filter(|module| floor(module).is_none()) {
        faults.push(format!("{name}/{}: a room without a place in ORDER", module[0]));
    }
    for (from, targets) in arrows {
        for to in targets.iter().filter(|to| floor(to) < floor(from)) {
            let (from, to) = (from.join("/"), to.join("/"));
            faults.push(format!("{name}/{from} must not use {name}/{to}, which stands above it"));
        }
    }
    faults
}

/// Everything that can be reached from a module.
fn reached(arrows: &Arrows, from: &Module) -> BTreeSet<Module> {
    let (mut found, mut open) = (BTreeSet::new(), vec![from.clone()]);
    while let Some(module) = open.pop() {
        for next in arrows.get(&module).into_iter().flatten() {
            if found.insert(next.clone()) {
                open.push(next.clone());
            }
        }
    }
    found
}

/// The circles: sets of modules that all reach each other.
fn circles(arrows: &Arrows) -> BTreeSet<BTreeSet<Module>> {
    let all: BTreeMap<_, _> = arrows.keys().map(|m| (m.clone(), reached(arrows, m))).collect();
    let circle = |module: &Module| -> BTreeSet<Module> {
        let back = |other: &&Module| all.get(*other).is_some_and(|theirs| theirs.contains(module));
        all[module].iter().filter(back).cloned().collect()
    };
    all.keys().map(circle).filter(|circle| circle.len() > 1).collect()
}

fn circle_faults(name: &str, arrows: &Arrows) -> Vec<String> {
    let mut faults = Vec::new();
    for circle in circles(arrows) {
        let names: Vec<String> = circle.iter().map(|m| format!("{name}/{}", m.join("/"))).collect();
        if names.len() > CIRCLE_MAX {
            faults.push(format!("a circle of {} files: {}", names.len(), names.join(", ")));
        }
    }
    faults
}

#[test]
fn every_room_uses_only_rooms_below_it_and_no_circle_of_files_is_large() {
    let mut faults = Vec::new();
    for (name, order) in ORDER {
        let modules = modules(name);
        assert!(modules.len() > 30, "{name}: found only {} modules", modules.len());
        let arrows = arrows(&modules);
        let all: Vec<Module> = modules.into_keys().collect();
        faults.extend(order_faults(name, order, &arrows, &all));
        faults.extend(circle_faults(name, &arrows));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn an_arrow_upwards_and_a_large_circle_are_found() {
    let texts = [
        ("a", "use crate::{b::{self, X}, c};"),
        ("b", "fn f() { super::c::g() }"),
        ("c", "// crate::a is only a comment\nuse crate::d::Y as Z;"),
        (
            "d",
            "#[cfg(test)]\nmod tests;\nuse super::a::W;\n#[cfg(test)]\nmod tests { use crate::e; }",
        ),
        ("e", "//! Alone."),
    ];
    let all = texts.map(|(name, text)| (vec![name.to_owned()], text.to_owned())).into();
    let arrows = arrows(&all);
    let names: Vec<Module> = all.into_keys().collect();
    assert_eq!(order_faults("x", &["a", "b", "c", "d", "e"], &arrows, &names).len(), 1);
    assert_eq!(order_faults("x", &["a", "b", "c", "d"], &arrows, &names).len(), 2);
    assert_eq!(circle_faults("x", &arrows), ["a circle of 4 files: x/a, x/b, x/c, x/d"]);
}
