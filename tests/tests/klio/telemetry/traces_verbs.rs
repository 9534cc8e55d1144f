//! Every command a person types has a root span `cli.<command>`, whatever becomes of it (docs/telemetry.md).
//!
//! The tables are compared with what the programs' own help lists: a verb that is not in them fails here.

use klio_tests::{
    otlp::{Collector, Span},
    programs::{self, Outcome},
    scratch::Scratch,
    traced::{check_all, variables},
};
use std::{collections::BTreeSet, path::Path};

/// Each verb with arguments that end it soon: most without a configuration, as a person who tries.
const KLIO: [&str; 16] = [
    "stream",
    "backup",
    "check --dsn postgres://klio:hunter2@localhost/x",
    "status",
    "list backups --from https://user:hunter2@host/x",
    "restore --to /nonexistent/x",
    "drill",
    "verify",
    "retention plan",
    "generation list",
    "timeline list",
    "wal-fetch 000000010000000000000001 /nonexistent/x",
    "wal-agent --spool /nonexistent/spool --fingerprint x --serve",
    "slot show --dsn password=hunter2",
    "reference metrics",
    "help status",
];

const SERVER: [&str; 8] = [
    "init DIR/made",
    "keygen",
    "key show -c DIR/absent.toml",
    "run -c DIR/absent.toml",
    "client x@y -c DIR/absent.toml",
    "backup remove x --cluster y -c DIR/absent.toml",
    "reference errors",
    // Hidden: the server starts it, with a job. traces_backup.rs sees its span.
    "repository",
];

/// Verbs that help does not list.
const HIDDEN: [&str; 3] = ["wal-agent", "reference", "repository"];

fn verb(line: &str) -> &str {
    line.split_whitespace().next().expect("a verb")
}

/// The verbs that help lists below "Commands:".
fn listed(help: &str) -> BTreeSet<&str> {
    let after = help.split("Commands:\n").nth(1).expect("a list of commands");
    let lines = after.lines().take_while(|line| !line.trim().is_empty() || line.starts_with("  "));
    let verbs = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    verbs.map(verb).collect()
}

fn in_table<'a>(table: &[&'a str]) -> BTreeSet<&'a str> {
    let verbs = table.iter().map(|line| verb(line));
    verbs.filter(|verb| !HIDDEN.contains(verb)).collect()
}

struct Rig {
    collector: Collector,
    scratch: Scratch,
}

impl Rig {
    async fn run(&self, program: &Path, line: &str) -> Outcome {
        let dir = self.scratch.path().display().to_string();
        let mut command = programs::command(program);
        command.args(line.split_whitespace().map(|word| word.replace("DIR", &dir)));
        command.envs(variables(&self.collector.endpoint())).current_dir(self.scratch.path());
        programs::run(command).await
    }

    /// Runs it and finds its root span: it was sent before the program ended.
    async fn root(&self, program: &Path, line: &str) -> (Outcome, Span) {
        let before = self.collector.spans().len();
        let outcome = self.run(program, line).await;
        let fresh = self.collector.spans().split_off(before);
        let name = format!("cli.{}", verb(line));
        let roots: Vec<&Span> = fresh.iter().filter(|s| s.name == name).collect();
        let [root] = roots[..] else {
            panic!("{line}: no {name} in {fresh:?}\n{}", outcome.stderr)
        };
        assert_eq!(root.parent, "", "{line}");
        let trace = format!("trace {}: delivered", root.trace);
        assert!(outcome.stderr.contains(&trace), "{line}: {}", outcome.stderr);
        check_all(&fresh, &["hunter2"]);
        (outcome, root.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_of_both_programs_is_a_trace() {
    let rig = Rig { collector: Collector::new().await, scratch: Scratch::new("verbs") };
    let (klio, server) = (programs::klio(), programs::klio_server());
    let help = programs::run_klio(&["help"]).await.stdout;
    assert_eq!(
        listed(&help),
        in_table(&KLIO),
        "a verb of klio without an entry, or an entry without a verb"
    );
    let mut command = programs::command(&server);
    command.arg("--help");
    let help = programs::run(command).await.stdout;
    let mut known = in_table(&SERVER);
    known.insert("help");
    assert_eq!(
        listed(&help),
        known,
        "a verb of klio-server without an entry, or an entry without a verb"
    );

    for line in KLIO {
        let (outcome, root) = rig.root(&klio, line).await;
        assert_eq!(root.service, "klio", "{line}");
        let shown = &root.attributes["cli.arguments"];
        assert!(shown.starts_with(verb(line)), "{shown}");
        let good = ["help", "reference"].contains(&verb(line));
        assert_eq!(
            (outcome.code == Some(0), root.failed),
            (good, !good),
            "{line}: {outcome:?} {root:?}"
        );
        assert_eq!(root.attributes.contains_key("error.type"), !good, "{root:?}");
    }
    for line in SERVER {
        if verb(line) == "repository" {
            continue;
        }
        let (outcome, root) = rig.root(&server, line).await;
        assert_eq!(root.service, "klio-server", "{line}");
        let good = ["init", "keygen", "reference"].contains(&verb(line));
        assert_eq!(
            (outcome.code == Some(0), root.failed),
            (good, !good),
            "{line}: {outcome:?} {root:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_that_the_caller_has_goes_on_and_output_stays_what_it_is() {
    let rig = Rig { collector: Collector::new().await, scratch: Scratch::new("verbs") };
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = "b7ad6b7169203331";
    for (program, line) in
        [(programs::klio(), "reference metrics"), (programs::klio_server(), "reference errors")]
    {
        let plain = {
            let mut command = programs::command(&program);
            command.args(line.split_whitespace());
            programs::run(command).await
        };
        let mut command = programs::command(&program);
        command.args(line.split_whitespace()).envs(variables(&rig.collector.endpoint()));
        command.env("TRACEPARENT", format!("00-{trace}-{parent}-01"));
        let with = programs::run(command).await;
        assert_eq!((with.stdout, with.code), (plain.stdout, plain.code), "{line}");
        assert_eq!(plain.stderr, "", "nothing configured: nothing said");
    }
    let spans = rig.collector.spans();
    assert_eq!(spans.len(), 2, "{spans:?}");
    assert!(spans.iter().all(|s| s.trace == trace && s.parent == parent), "{spans:?}");
    // A key that is printed is nothing but the key, whatever exporter was asked for.
    let mut command = programs::command(&programs::klio_server());
    command
        .arg("keygen")
        .env("OTEL_TRACES_EXPORTER", "console")
        .env("OTEL_LOGS_EXPORTER", "console");
    let printed = programs::run(command).await.stdout;
    let lines: Vec<&str> = printed.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(lines.len() == 1 && lines[0].starts_with("AGE-SECRET-KEY-"), "{} lines", lines.len());
}
