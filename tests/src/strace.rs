//! The system calls of real programs, watched with strace: what a program asks of the disk, and in which order.
//!
//! A killed process loses nothing that it wrote, because the page cache stays. So a missing fsync shows in no test that kills: it
//! shows only here. strace writes each line before the traced thread goes on, so what a caller has seen happen is in the log.

use crate::{env, process::Running, scratch::Scratch, wait::eventually_now};
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// The calls that are watched: those that write, sync and name files.
const CALLS: &str = "trace=openat,write,writev,pwrite64,pwritev,fsync,fdatasync,syncfs,rename,renameat,renameat2,link,linkat,copy_file_range,ftruncate";

/// One finished call that succeeded.
#[derive(Debug, Clone)]
pub struct Call {
    /// `fdatasync`.
    pub name: String,
    /// The paths of the arguments, in their order: of a file descriptor, or as given.
    pub paths: Vec<PathBuf>,
    /// Whether the call may make a file (`O_CREAT`).
    pub creates: bool,
    /// The line in which it began and the line in which it ended.
    pub lines: (usize, usize),
}

impl Call {
    /// Whether it syncs a file or a directory.
    #[must_use]
    pub fn syncs(&self) -> bool {
        matches!(self.name.as_str(), "fsync" | "fdatasync")
    }

    /// Whether it writes into a file.
    #[must_use]
    pub fn writes(&self) -> bool {
        self.name.contains("write") || self.name == "copy_file_range"
    }

    /// Whether it gives a file a name: the last path.
    #[must_use]
    pub fn names(&self) -> bool {
        self.name.starts_with("rename") || self.name.starts_with("link")
    }

    /// Its first path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.paths.first().map_or(Path::new(""), PathBuf::as_path)
    }
}

/// strace at work, or what it wrote.
#[derive(Debug)]
pub struct Strace {
    scratch: Scratch,
    running: Option<Running>,
}

impl Strace {
    fn arguments(log: &Path) -> Vec<String> {
        let log = log.display().to_string();
        ["-f", "-y", "-s", "0", "-o", &log, "-e", CALLS].map(str::to_owned).to_vec()
    }

    /// Watches a running program, all its threads and all that it starts later.
    ///
    /// # Panics
    /// When strace cannot attach.
    pub async fn attach(pid: u32) -> Self {
        let scratch = Scratch::new("strace");
        let mut command = Command::new(env::tool("strace"));
        command.args(Self::arguments(&scratch.join("calls"))).args(["-p", &pid.to_string()]);
        let mut running = Running::spawn("strace", command, &scratch.join("strace.log"));
        running.wait_log("attached", Duration::from_secs(60)).await;
        Self { scratch, running: Some(running) }
    }

    /// A command that runs `command` (its program, arguments and variables) watched, in an environment that is otherwise clean.
    #[must_use]
    pub fn wrap(command: &Command) -> (Self, Command) {
        let scratch = Scratch::new("strace");
        let mut wrapped = crate::programs::command(&env::tool("strace"));
        wrapped.args(Self::arguments(&scratch.join("calls")));
        wrapped.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        (Self { scratch, running: None }, wrapped)
    }

    /// How many lines there are now: a moment in the log.
    #[must_use]
    pub fn now(&self) -> usize {
        self.text().lines().count()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.scratch.join("calls")).unwrap_or_default()).into()
    }

    /// All calls that have succeeded so far, in the order of their ends.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        parse(&self.text())
    }

    /// Waits until the watched program has ended.
    pub async fn ended(&mut self) {
        if let Some(running) = &mut self.running {
            eventually_now("strace to end", Duration::from_secs(60), || running.exit()).await;
        }
    }
}

/// `1234 fdatasync(7</a/b>) = 0`, and in two halves `… <unfinished ...>`, `… <... fdatasync resumed>) = 0`.
fn parse(text: &str) -> Vec<Call> {
    let mut begun: HashMap<&str, (usize, String)> = HashMap::new();
    let mut calls = Vec::new();
    for (line, content) in text.lines().enumerate() {
        let Some((thread, rest)) = content.split_once(' ') else { continue };
        let rest = rest.trim_start();
        if let Some(half) = rest.strip_suffix("<unfinished ...>") {
            begun.insert(thread, (line, half.to_owned()));
        } else if let Some(resumed) = rest.strip_prefix("<... ") {
            let Some((first, half)) = begun.remove(thread) else { continue };
            let Some((_, end)) = resumed.split_once(" resumed>") else { continue };
            calls.extend(call(&(half + end), (first, line)));
        } else {
            calls.extend(call(rest, (line, line)));
        }
    }
    calls
}

fn call(text: &str, lines: (usize, usize)) -> Option<Call> {
    let (name, rest) = text.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(" = ")?;
    if result.starts_with(['-', '?']) {
        return None;
    }
    let paths = paths(arguments);
    Some(Call { name: name.to_owned(), paths, creates: arguments.contains("O_CREAT"), lines })
}

/// Paths of descriptors (`7</a/b>`) and of strings (`"/a/b"`), as they stand; a relative string belongs to the descriptor before it.
fn paths(arguments: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let (mut directory, mut rest) = (None, arguments);
    while let Some(at) = rest.find(['<', '"']) {
        let close = if rest.as_bytes()[at] == b'<' { '>' } else { '"' };
        let inner = &rest[at + 1..];
        let Some(end) = inner.find(close) else { break };
        let (path, is_descriptor) = (PathBuf::from(&inner[..end]), close == '>');
        let at_cwd = is_descriptor && rest[..at].ends_with("AT_FDCWD");
        rest = &inner[end + 1..];
        if at_cwd {
            directory = Some(path);
        } else if is_descriptor {
            found.push(path);
        } else {
            found.push(
                directory.as_ref().map_or(path.clone(), |directory: &PathBuf| directory.join(path)),
            );
        }
    }
    found
}

/// Every name that was given below one of these directories was given durably: the file was synced after its last write and before it
/// got the name, and the directory was synced afterwards. Gives those of which that is not so, in words.
#[must_use]
pub fn undurable_names(calls: &[Call], directories: &[PathBuf], exempt: &[&str]) -> Vec<String> {
    let below = |path: &Path| directories.iter().any(|directory| path.starts_with(directory));
    let exempt = |path: &Path| exempt.iter().any(|end| path.to_string_lossy().ends_with(end));
    let mut wrong = Vec::new();
    let named = calls.iter().filter(|c| c.names());
    for naming in named {
        let (Some(from), Some(to)) = (naming.paths.first(), naming.paths.last()) else { continue };
        if !below(to) || exempt(to) {
            continue;
        }
        // A name that is taken from a file that had it for long (a journal that is used again) was synced earlier.
        let wrote =
            calls.iter().rfind(|c| c.writes() && c.path() == from && c.lines.1 < naming.lines.0);
        let synced = wrote.is_none_or(|wrote| {
            calls.iter().any(|c| {
                c.syncs()
                    && c.path() == from
                    && c.lines.0 > wrote.lines.1
                    && c.lines.1 < naming.lines.0
            })
        });
        if !synced {
            wrong.push(format!("{} was named {} unsynced", from.display(), to.display()));
        }
        let directory = to.parent().unwrap_or(Path::new("/"));
        let directory_synced = calls
            .iter()
            .any(|c| c.name == "fsync" && c.path() == directory && c.lines.0 > naming.lines.1);
        if !directory_synced {
            wrong.push(format!("the directory of {} was not synced", to.display()));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
10 openat(AT_FDCWD</>, \"/t/a.tmp\", O_RDWR|O_CREAT|O_EXCL, 0600) = 7</t/a.tmp>
10 pwrite64(7</t/a.tmp>, \"\"..., 10, 0) = 10
10 fdatasync(7</t/a.tmp> <unfinished ...>
11 pwrite64(8</t/b.open>, \"\"..., 10, 0) = 10
10 <... fdatasync resumed>) = 0
10 rename(\"/t/a.tmp\", \"/t/a\") = 0
10 fsync(9</t>) = 0
11 fsync(9</t/x>) = -1 EIO (Input/output error)
";

    #[test]
    fn calls_are_read_whole_or_in_two_halves_and_failures_are_none() {
        let calls = parse(LOG);
        let names: Vec<_> = calls.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["openat", "pwrite64", "pwrite64", "fdatasync", "rename", "fsync"]);
        assert_eq!((calls[3].lines, calls[3].path()), ((2, 4), Path::new("/t/a.tmp")));
        assert!(calls[0].creates && calls[0].paths[0] == Path::new("/t/a.tmp"));
        assert_eq!(calls[4].paths, [PathBuf::from("/t/a.tmp"), PathBuf::from("/t/a")]);
    }

    #[test]
    fn a_name_without_its_syncs_is_found() {
        let directories = [PathBuf::from("/t")];
        assert_eq!(undurable_names(&parse(LOG), &directories, &[]), Vec::<String>::new());
        for (left_out, found) in [("fdatasync", "unsynced"), ("fsync(9</t>", "was not synced")] {
            let fewer: String = LOG
                .lines()
                .filter(|l| !l.contains(left_out))
                .fold(String::new(), |t, l| t + l + "\n");
            let wrong = undurable_names(&parse(&fewer), &directories, &[]);
            assert!(wrong.len() == 1 && wrong[0].contains(found), "{wrong:?}");
        }
    }
}
