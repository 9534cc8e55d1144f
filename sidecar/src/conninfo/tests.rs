//! Connection strings and variables, against libpq's documented behaviour.

use super::*;
use proptest::prelude::*;

const ENV: &[(&str, &str)] = &[("HOME", "/home/klio")];

fn parse_env(text: &str, env: &[(&str, &str)]) -> Result<ConnInfo, ConnInfoError> {
    let lookup = |name: &str| {
        env.iter().chain(ENV).find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    };
    ConnInfo::parse_as(text, &lookup, Some("osuser"))
}

fn parse(text: &str) -> ConnInfo {
    parse_env(text, &[]).unwrap()
}

fn refused(text: &str) -> String {
    parse_env(text, &[]).expect_err(text).to_string()
}

fn tcp(name: &str, port: u16) -> Host {
    Host { target: HostTarget::Tcp { name: name.into(), addr: None }, port }
}

#[test]
fn empty_string_gives_libpq_defaults() {
    let c = parse("  ");
    assert_eq!(c.hosts[0].to_string(), "/var/run/postgresql/.s.PGSQL.5432");
    assert_eq!((c.user.as_str(), c.sql_database()), ("osuser", "osuser"));
    assert_eq!(c.tls.mode, SslMode::Prefer);
    assert_eq!(c.tls.root, RootCert::DefaultFile("/home/klio/.postgresql/root.crt".into()));
    assert_eq!(c.passfile, Some("/home/klio/.pgpass".into()));
    assert_eq!(c.application_name, "klio");
    assert_eq!(c.keepalive, Some(Keepalive::default()));
}

#[test]
fn values_may_be_quoted_and_escaped() {
    let c = parse(r"host = db1  user='kl io' password='it\'s \\ x' dbname=a\ b");
    assert_eq!(c.hosts, [tcp("db1", 5432)]);
    assert_eq!(c.user, "kl io");
    assert_eq!(c.password.as_ref().map(Password::reveal), Some(r"it's \ x"));
    assert_eq!(c.dbname.as_deref(), Some("a b"));
}

#[test]
fn uri_is_percent_decoded() {
    let c = parse(
        "postgresql://us%65r:p%40ss%3A@db1:5433,[::1],db3:1/my%20db?sslmode=verify-full&application_name=x",
    );
    assert_eq!(c.hosts, [tcp("db1", 5433), tcp("::1", 5432), tcp("db3", 1)]);
    assert_eq!((c.user.as_str(), c.dbname.as_deref()), ("user", Some("my db")));
    assert_eq!(c.password.as_ref().map(Password::reveal), Some("p@ss:"));
    assert_eq!((c.tls.mode, c.application_name.as_str()), (SslMode::VerifyFull, "x"));
    assert_eq!(c.hosts[1].to_string(), "[::1]:5432");
}

#[test]
fn uri_takes_a_socket_directory() {
    for text in ["postgres://%2Frun%2Fpg/db", "postgres:///db?host=/run/pg"] {
        assert_eq!(parse(text).hosts[0].socket_path(), Some("/run/pg/.s.PGSQL.5432".into()));
    }
    assert_eq!(parse("postgres://db?ssl=true").tls.mode, SslMode::Require);
}

#[test]
fn string_beats_environment_beats_default() {
    let env = [("PGHOST", "envhost"), ("PGPORT", "6000"), ("PGPASSWORD", "envpw"), ("PGUSER", "")];
    let c = parse_env("host=texthost", &env).unwrap();
    assert_eq!(c.hosts, [tcp("texthost", 6000)]);
    assert_eq!(c.password.as_ref().map(Password::reveal), Some("envpw"));
    assert_eq!(c.user, "osuser");
}

#[test]
fn several_hosts_share_one_port_or_have_their_own() {
    assert_eq!(parse("host=a,b port=7").hosts, [tcp("a", 7), tcp("b", 7)]);
    assert_eq!(parse("host=a,b port=7,8").hosts, [tcp("a", 7), tcp("b", 8)]);
    assert_eq!(parse("host=a,b port=7,").hosts, [tcp("a", 7), tcp("b", 5432)]);
    assert!(refused("host=a,b,c port=7,8").contains("found 2 and 3"));
    assert!(refused("host=a,b hostaddr=127.0.0.1").contains("found 1 and 2"));
    let c = parse("host=db.example hostaddr=127.0.0.1 target_session_attrs=primary");
    assert_eq!(c.hosts[0].to_string(), "db.example:5432 (127.0.0.1)");
    assert_eq!(c.target_session_attrs, TargetSessionAttrs::Primary);
}

#[test]
fn unknown_keyword_is_named() {
    assert_eq!(refused("hots=db1"), "read connection string: unknown keyword \"hots\"");
    assert!(refused("postgres://db1/?sslmod=x").contains("\"sslmod\""));
}

#[test]
fn unsupported_keyword_is_named_with_what_to_do_instead() {
    assert!(refused("sslcrl=/x").contains("sslcrl is not supported"));
    assert!(refused("gssencmode=require").contains("expected disable or prefer"));
    let err = parse_env("", &[("PGREQUIREPEER", "postgres")]).unwrap_err();
    assert!(err.to_string().starts_with("PGREQUIREPEER: requirepeer is not supported"), "{err}");
}

#[test]
fn direct_tls_and_ways_to_log_in_are_understood_or_refused_with_what_would_do() {
    assert!(parse("sslmode=verify-full sslnegotiation=direct").tls.direct);
    assert!(!parse("sslmode=require sslnegotiation=postgres").tls.direct);
    assert!(refused("sslnegotiation=direct").contains("sslmode=require"));
    assert!(parse("require_auth=scram-sha-256").require_auth.allows(3).is_err());
    assert!(parse("").require_auth.allows(3).is_ok());
    assert!(refused("require_auth=scram").contains("scram-sha-256"));
    assert!(parse_env("", &[("PGREQUIREAUTH", "!md5")]).unwrap().require_auth.allows(5).is_err());
}

#[test]
fn values_out_of_range_say_where_and_what() {
    let err = parse_env("", &[("PGSSLMODE", "on")]).unwrap_err().to_string();
    assert!(err.starts_with("PGSSLMODE: sslmode: expected one of disable, allow"), "{err}");
    for bad in ["port=0", "port=x", "port=70000", "connect_timeout=-1", "hostaddr=db", "host=@x"] {
        assert!(refused(bad).contains("expected"), "{bad}");
    }
    for bad in ["host", "=x", "host db", "password='abc", "postgres://[::1/", "postgres://a%zz"] {
        assert!(matches!(parse_env(bad, &[]), Err(ConnInfoError::Syntax { .. })), "{bad}");
    }
}

#[test]
fn system_roots_demand_verify_full() {
    assert_eq!(parse("sslrootcert=system").tls.mode, SslMode::VerifyFull);
    assert!(refused("sslrootcert=system sslmode=require").contains("verify-full"));
    assert!(
        refused("ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2")
            .contains("found TLSv1.3 and TLSv1.2")
    );
}

#[test]
fn nobody_to_be_is_an_error() {
    assert_eq!(ConnInfo::parse_as("", &|_| None, None), Err(ConnInfoError::NoUser));
}

#[test]
fn password_is_never_printed() {
    for text in ["password=hunter2 host=a", "postgres://u:hunter2@a/db"] {
        let c = parse(text);
        assert!(!format!("{c} {c:?}").contains("hunter2"));
        assert!(c.to_string().contains("password=***"), "{c}");
    }
    for bad in ["password=hun ter2", "user=a password='hunter2", "postgres://u:hunter2%zz@a"] {
        let err = parse_env(bad, &[]).unwrap_err();
        assert!(!format!("{err} {err:?}").contains("ter2"), "{err}");
    }
}

#[test]
fn given_password_beats_the_password_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pass");
    std::fs::write(&path, "a:5432:replication:u:filepw\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, mode).unwrap();
    let env = [("PGPASSFILE", path.to_str().unwrap())];
    let reveal =
        |c: ConnInfo| c.password_for(&c.hosts[0], "replication").map(|p| p.reveal().to_owned());
    let get = |text| reveal(parse_env(text, &env).unwrap());
    assert_eq!(get("host=a user=u").as_deref(), Some("filepw"));
    assert_eq!(get("host=a user=u password=x").as_deref(), Some("x"));
    assert_eq!(get("host=b user=u"), None);
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,60}", uri in "postgres://[ -~]{0,40}") {
        let _ = parse_env(&text, &[]);
        let _ = parse_env(&uri, &[]);
    }

    #[test]
    fn what_is_shown_reads_back_the_same(user in "[ -~]{1,12}", db in "[ -~]{1,12}") {
        let mut c = parse("host=a,/run/x port=1,2 sslmode=require sslcert=/c");
        c.user = user;
        c.dbname = Some(db);
        prop_assert_eq!(parse(&c.to_string()), c);
    }
}
