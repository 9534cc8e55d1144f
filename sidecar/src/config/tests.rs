//! Layers, refusals and redaction of the configuration.

use super::{keys::KEYS, *};

const BUNDLE: &str = r#"
cluster = "pg-1"
[server]
address = "https://db.example:7423"
[postgres]
dsn = "host=/run/postgresql user=klio password=hunter2"
[stream]
on_gap = "stop"
batch_size = "256KiB"
"#;

const ALL: Needs = Needs { server: true, cluster: true, postgres: true, source: false };

fn parse(text: &str) -> Result<Config, Vec<String>> {
    Config::from_layers(Some(text), &[], &[])
}

#[test]
fn a_bundle_s_file_is_enough() {
    let config = parse(BUNDLE).unwrap();
    config.validate(ALL).unwrap();
    assert_eq!(config.cluster().unwrap().as_str(), "pg-1");
    assert_eq!(config.stream.on_gap, OnGap::Stop);
    assert_eq!(config.stream.batch_size, ByteSize::kib(256));
    assert_eq!(config.postgres.slot, "klio");
}

/// The name in a restore_command has the number of its generation, and the file may have one as well (P11).
#[test]
fn a_number_in_the_cluster_s_name_holds_whatever_the_generation_is_set_to() {
    let file = "cluster = \"pg-1\"\ngeneration = \"3\"";
    let cluster = |flags: &[(&str, String)]| {
        Config::from_layers(Some(file), &[], flags).unwrap().cluster().unwrap()
    };
    assert_eq!(cluster(&[]).as_str(), "pg-1@3");
    assert_eq!(cluster(&[("generation", "2".into())]).as_str(), "pg-1@2");
    assert_eq!(cluster(&[("cluster", "pg-1@2".into())]).as_str(), "pg-1@2");
}

#[test]
fn unknown_settings_are_refused_by_name() {
    for text in ["colour = 1", "[server]\nadress = \"x\"", "[nonsense]\nx = 1"] {
        assert!(parse(text).is_err(), "{text}");
    }
    let problems = parse("[server]\nadress = \"x\"").unwrap_err();
    assert!(problems[0].contains("adress"), "{problems:?}");
}

#[test]
fn absurd_files_are_refused_without_a_panic() {
    for text in ["\0", "[", "server = 3", "[stream]\nbatch_size = 1", "cluster = 1", "[[server]]"] {
        assert!(parse(text).is_err(), "{text:?}");
    }
    let empty = parse("").unwrap();
    assert!(empty.validate(ALL).is_err());
}

#[test]
fn validate_gives_every_problem_at_once() {
    let text = "cluster = \"../x\"\n[server]\naddress = \"http://x\"\n[postgres]\nslot = \"A-B\"\n[stream]\nbatch_size = \"1B\"\nstatus_interval = \"1h\"\n[admin]\nlisten = \"x\"";
    let message = parse(text).unwrap().validate(ALL).unwrap_err().message;
    for part in
        ["../x", "server.address", "postgres.slot", "batch_size", "status_interval", "admin.listen"]
    {
        assert!(message.contains(part), "{part} in {message}");
    }
}

/// With a wrong --from, the hint used to send people looking for a klio.toml.
#[test]
fn what_is_set_and_wrong_is_not_said_to_be_missing() {
    let source = Needs { source: true, cluster: true, ..Needs::default() };
    let flags = |from: &str, cluster: &str| {
        let flags = [("restore.from", from.to_owned()), ("cluster", cluster.to_owned())];
        Config::from_layers(None, &[], &flags).unwrap().validate(source).unwrap_err()
    };
    let wrong = flags("ftp://x", "main");
    assert!(wrong.message.contains("--from") && !wrong.hint.contains("klio.toml"), "{wrong}");
    let missing = flags("file:///x", "");
    assert!(missing.hint.contains("no klio.toml was found"), "{missing}");
    let nothing = Config::from_layers(None, &[], &[]).unwrap().validate(ALL).unwrap_err();
    assert!(nothing.hint.contains("no klio.toml was found"), "{nothing}");
}

#[test]
fn plaintext_needs_the_option_that_says_it_is_unsafe() {
    let plain = "[server]\naddress = \"http://127.0.0.1:1\"\n";
    let needs = Needs { server: true, ..Needs::default() };
    assert!(parse(plain).unwrap().validate(needs).is_err());
    let open = format!("{plain}unsafe_plaintext = true\n");
    assert!(parse(&open).unwrap().validate(needs).is_ok());
}

#[test]
fn passwords_do_not_print() {
    let config = parse(BUNDLE).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
}

/// The environment is read through the table, so each row must be a real setting.
#[test]
fn every_key_of_the_table_is_a_setting() {
    for key in KEYS {
        let value = match (key.path, key.default) {
            (_, default) if !default.is_empty() => default.to_owned(),
            ("telemetry.log_format", _) => "json".to_owned(),
            ("admin.listen", _) => "127.0.0.1:1".to_owned(),
            ("tier2.path_style", _) => "true".to_owned(),
            _ => "pg-1".to_owned(),
        };
        let environment = vec![(key.variable(), value)];
        let read = Config::from_layers(None, &environment, &[]);
        assert!(read.is_ok(), "{}: {:?}", key.path, read.err());
    }
}

#[test]
fn paths_are_relative_to_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("klio.toml");
    std::fs::write(&file, BUNDLE).unwrap();
    let config = Config::load(Some(&file), &[]).unwrap();
    assert_eq!(config.server.cert, directory.path().join("client.crt"));
    assert!(Config::load(Some(&directory.path().join("none.toml")), &[]).is_err());
}
