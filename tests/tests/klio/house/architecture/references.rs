//! What comments and pages refer to exists: promises, numbered rules of rooms, pages, files, and a row for every room.
//!
//! A finding names file and line. The checks themselves are checked on made-up input, so that they can fail.

use klio_tests::env;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Words of a letter and a number that are no rule of ours: Amazon's store, and the control characters of ISO 6429.
const NO_RULES: [&str; 3] = ["S3", "C0", "C1"];
/// Crates whose rooms have a row each.
const WITH_ROOMS: [&str; 3] = ["server", "sidecar", "storage"];

/// A file of the repository, by its path from the root.
struct Source {
    path: String,
    text: String,
}

/// Every file that git knows with one of these endings.
fn sources(endings: &[&str]) -> Vec<Source> {
    let root = env::repository();
    let args = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let listed = Command::new("git").args(args).current_dir(&root).output().expect("run git");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).expect("names are text");
    let wanted = |name: &&str| endings.iter().any(|end| name.ends_with(end));
    let there = names.lines().filter(wanted).filter(|name| root.join(name).is_file());
    let read = |name: &str| Source {
        path: name.to_owned(),
        text: fs::read_to_string(root.join(name)).expect("read a file of the repository"),
    };
    // This file is full of references to nothing.
    there.map(read).filter(|source| !source.path.ends_with("architecture/references.rs")).collect()
}

/// The comment of a line of Rust or protobuf, if it has one. A `//` behind a colon is a URL's.
fn comment(line: &str) -> Option<&str> {
    let begins = |at: &usize| *at == 0 || !line[..*at].ends_with(':');
    line.match_indices("//").map(|(at, _)| at).find(begins).map(|at| &line[at..])
}

/// The letters and the number of a word that has first the ones and then the other.
fn code(word: &str) -> Option<(&str, u32)> {
    let digits = word.find(|c: char| c.is_ascii_digit())?;
    let (letters, number) = word.split_at(digits);
    let fits = !letters.is_empty()
        && letters.bytes().all(|b| b.is_ascii_uppercase())
        && number.len() <= 2
        && number.bytes().all(|b| b.is_ascii_digit());
    fits.then(|| Some((letters, number.parse().ok()?)))?
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
}

/// The rule that a line of a file's header defines: `//! REPO1  a file is ...`.
fn defined(line: &str) -> Option<&str> {
    let text = line.strip_prefix("//! ")?;
    let text = text.strip_prefix("- ").unwrap_or(text);
    let (word, rest) = text.split_once("  ")?;
    (code(word).is_some() && !rest.is_empty()).then_some(word)
}

/// The promises of a page: rows that begin with `| P1 |`.
fn promises(page: &str) -> BTreeSet<String> {
    let first = |line: &str| Some(line.strip_prefix("| P")?.split_once(" |")?.0.to_owned());
    page.lines().filter_map(first).map(|number| format!("P{number}")).collect()
}

/// What is wrong with the numbers that comments cite.
fn code_faults(files: &[Source], promises: &BTreeSet<String>) -> Vec<String> {
    let mut rules: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            if let Some(rule) = defined(line) {
                rules.entry(rule).or_default().push(format!("{}:{}", file.path, number + 1));
            }
        }
    }
    let prefixes: BTreeSet<&str> =
        rules.keys().filter_map(|rule| code(rule)).map(|(letters, _)| letters).collect();
    let twice = rules.iter().filter(|(_, places)| places.len() > 1);
    let mut faults: Vec<String> = twice
        .map(|(rule, places)| format!("{rule} is defined more than once: {}", places.join(", ")))
        .collect();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            for word in words(comment(line).unwrap_or_default()) {
                let Some((letters, _)) = code(word) else { continue };
                let known = match letters {
                    "P" => promises.contains(word),
                    _ if letters.len() == 1 => NO_RULES.contains(&word),
                    _ => !prefixes.contains(letters) || rules.contains_key(word),
                };
                if !known {
                    faults.push(format!("{}:{}: {word} is defined nowhere", file.path, number + 1));
                }
            }
        }
    }
    faults
}

/// The pages that a comment names.
fn pages(comment: &str) -> impl Iterator<Item = &str> {
    let part = |c: char| !(c.is_ascii_alphanumeric() || "._-/".contains(c));
    comment.split(part).map(|word| word.trim_matches('.')).filter(|word| {
        word.strip_suffix(".md").is_some_and(|name| !name.is_empty()) && !word.starts_with("//")
    })
}

fn page_exists(page: &str, from: &Path) -> bool {
    let root = env::repository();
    [root.join(page), root.join("docs").join(page), root.join(from).with_file_name(page)]
        .iter()
        .any(|path| path.is_file())
}

/// `a/{b,c}.rs` is two paths.
fn expand(path: &str) -> Vec<String> {
    match path.split_once('{').and_then(|(head, rest)| Some((head, rest.split_once('}')?))) {
        Some((head, (all, tail))) => {
            all.split(',').map(|one| format!("{head}{one}{tail}")).collect()
        }
        None => vec![path.to_owned()],
    }
}

/// Files that a page names in code marks, from the repository's root.
fn files_of(page: &str) -> Vec<String> {
    let marked = page.split('`').skip(1).step_by(2);
    let file = |text: &&str| {
        text.contains('/') && [".rs", ".sh", ".md", ".proto"].iter().any(|e| text.ends_with(e))
    };
    marked.filter(file).flat_map(expand).collect()
}

/// The rooms of a crate: its modules.
fn rooms(name: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(env::repository().join(name).join("src")).expect("read a crate");
    let names = entries.flatten().map(|entry| PathBuf::from(entry.file_name()));
    let stems = names.filter_map(|name| Some(name.file_stem()?.to_str()?.to_owned()));
    stems.filter(|stem| !["lib", "main", "tests"].contains(&stem.as_str())).collect()
}

fn architecture() -> String {
    fs::read_to_string(env::repository().join("ARCHITECTURE.md")).expect("read ARCHITECTURE.md")
}

#[test]
fn what_a_comment_cites_by_number_is_defined_once() {
    let files = sources(&[".rs", ".proto"]);
    let promises = promises(&architecture());
    assert!(files.len() > 300 && promises.len() >= 13, "{} {promises:?}", files.len());
    let faults = code_faults(&files, &promises);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn no_comment_cites_a_page_that_is_not_there() {
    let mut faults = Vec::new();
    for file in sources(&[".rs", ".proto"]) {
        for (number, line) in file.text.lines().enumerate() {
            let missing = |page: &&str| !page_exists(page, Path::new(&file.path));
            let missing = pages(comment(line).unwrap_or_default()).filter(missing);
            faults.extend(missing.map(|page| format!("{}:{}: {page}", file.path, number + 1)));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_room_has_a_row_and_every_file_of_the_map_exists() {
    let page = architecture();
    let mut faults = Vec::new();
    for name in WITH_ROOMS {
        for room in rooms(name) {
            if !page.contains(&format!("`{name}/{room}")) {
                faults.push(format!("ARCHITECTURE.md: no row for {name}/{room}"));
            }
        }
    }
    let root = env::repository();
    let gone = files_of(&page).into_iter().filter(|path| !root.join(path).exists());
    faults.extend(gone.map(|path| format!("ARCHITECTURE.md: {path} is not there")));
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_reference_to_nothing_is_found() {
    let file = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
    let some = promises("| P1 | durable |\n| P13 | a client |\n");
    let good = [
        file(
            "a.rs",
            "//! REPO1  a file is whole (P1).\n// REPO1, P13; as S3 does it\nlet x = \"Q7\";\n",
        ),
        file("b.rs", "//! Of the house.\nlet url = \"https://example.org/P99\";\n"),
    ];
    assert_eq!(code_faults(&good, &some), Vec::<String>::new());
    let bad = |text: &str| code_faults(&[file("a.rs", text)], &some).len();
    assert_eq!(bad("// (P14)\n"), 1);
    assert_eq!(bad("let a = 1; // A1\n"), 1);
    assert_eq!(bad("//! REPO1  one\n// REPO2\n"), 1);
    assert_eq!(bad("//! REPO1  one\n//! REPO1  another\n"), 1);
    assert_eq!(
        pages("/// (see field.md, docs/x.md)").collect::<Vec<_>>(),
        ["field.md", "docs/x.md"]
    );
    assert!(page_exists("ARCHITECTURE.md", Path::new("a/b.rs")));
    assert!(page_exists("formats.md", Path::new("a/b.rs")));
    assert!(!page_exists("field.md", Path::new("a/b.rs")));
    assert_eq!(files_of("go to `a/{b,c}.rs` or `word`"), ["a/b.rs", "a/c.rs"]);
}
