//! Ends what tests have started when the test program itself is killed and no destructor runs.
//!
//! One shell per test program holds the end of a pipe. It keeps the list of process groups that are alive; when the pipe
//! closes, for whatever reason, it kills those left and deletes every scratch directory. PostgreSQL's backends leave the
//! group, but end with their postmaster.

use std::{
    fmt::Display,
    io::Write,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::Mutex,
};

const SCRIPT: &str = r#"
groups=" " dirs="" kept=" "
while read -r verb rest; do
    case "$verb" in
        add) groups="$groups$rest " ;;
        del) groups="${groups%% "$rest" *} ${groups#* "$rest" }" ;;
        keep) kept="$kept$rest " ;;
        dir) dirs="$dirs$rest
" ;;
    esac
done
for group in $groups; do kill -9 "-$group"; done
# Twice, because what was just killed may have written once more.
for pause in 0 1; do
    sleep $pause
    printf '%s' "$dirs" | while read -r dir; do
        case "$kept" in *" $dir "*) ;; *) rm -rf -- "$dir" ;; esac
    done
done
"#;

struct Guard {
    input: ChildStdin,
    // Kept so that it is not lost; it ends by itself when this process ends.
    _shell: Child,
}

static GUARD: Mutex<Option<Guard>> = Mutex::new(None);

fn begin() -> Guard {
    let mut shell = Command::new("sh")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A Ctrl-C meant for the test program must not end the guard first.
        .process_group(0)
        .spawn()
        .expect("start sh as the guard of test processes");
    let input = shell.stdin.take().expect("the guard's input is a pipe");
    Guard { input, _shell: shell }
}

fn tell(verb: &str, what: impl Display) {
    let mut guard = GUARD.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let guard = guard.get_or_insert_with(begin);
    // Without its guard a test still works; it only leaves processes behind when killed.
    let _ = writeln!(guard.input, "{verb} {what}").and_then(|()| guard.input.flush());
}

/// Puts a process group under guard.
pub fn watch(group: u32) {
    tell("add", group);
}

/// Releases it, once it is dead: its number may be used again by others.
pub fn release(group: u32) {
    tell("del", group);
}

/// Has a scratch directory deleted when this program ends, if it is still there then.
pub fn delete_in_the_end(dir: &Path) {
    tell("dir", dir.display());
}

/// Has a scratch directory kept after all: what failed in it is to be looked at.
pub fn keep(dir: &Path) {
    tell("keep", dir.display());
}
