//! `klio-server init DIR`: creates everything that a first start needs, in one directory. Overwrites nothing.

use super::keygen;
use crate::access::pki::{self, CA_CERT, CA_KEY, Subject};
use anyhow::{Context, bail};
use klio_storage::{crypt::Keys, layout::ClusterName};
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// The configuration's name in the directory.
pub const CONFIG_FILE: &str = "klio-server.toml";
/// The age identity's name in the directory.
pub const IDENTITY_FILE: &str = "identity.txt";

/// Arguments of `init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory to create or fill
    pub dir: PathBuf,
    /// Host names and addresses by which the server is reached; client bundles use the first one
    #[arg(long = "host", default_values_t = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()])]
    pub hosts: Vec<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:7423")]
    pub listen: std::net::SocketAddr,
    /// Address that serves /livez, /readyz and /metrics
    #[arg(long, default_value = "127.0.0.1:7424")]
    pub admin_listen: std::net::SocketAddr,
    /// Directory for WAL and base backups [default: data in DIR]
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Cluster of the first client bundle
    #[arg(long, default_value = "main")]
    pub cluster: String,
    /// Store WAL and the keys of base backups unencrypted, without an identity
    #[arg(long)]
    pub unencrypted: bool,
    /// Additional age recipients, such as the public key of an offline recovery identity
    #[arg(long = "recipient", conflicts_with = "unencrypted")]
    pub recipients: Vec<String>,
}

/// Writes the directory.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let cluster: ClusterName = args.cluster.parse()?;
    let hosts: Vec<String> = args.hosts.iter().map(|host| bare(host)).collect();
    let Some(host) = hosts.first() else { bail!("--host: expected at least one name") };
    for name in [CONFIG_FILE, IDENTITY_FILE, CA_CERT, CA_KEY, "server.crt", "server.key"] {
        let path = args.dir.join(name);
        if path.exists() {
            bail!(
                "{} exists already; hint: init never overwrites, choose another directory",
                path.display()
            );
        }
    }
    let (identity, recipient) = keygen::generate();
    Keys::of(&identity, &args.recipients, "--recipient")?;
    private_dir(&args.dir)?;
    let authority = pki::new_authority()?;
    let server = pki::issue_server(&authority, &hosts)?;
    let write =
        |name: &str, content: &str, secret| pki::write_new(&args.dir.join(name), content, secret);
    write(CA_CERT, &authority.cert, false)?;
    write(CA_KEY, &authority.key, true)?;
    write("server.crt", &server.cert, false)?;
    write("server.key", &server.key, true)?;
    if !args.unencrypted {
        write(IDENTITY_FILE, identity.expose(), true)?;
    }
    let address = address(host, args.listen.port());
    // The configuration file may contain credentials of the bucket, so only its owner may read it.
    write(CONFIG_FILE, &config_text(args, &address), true)?;
    let subject = Subject::Client(format!("klio@{cluster}"));
    let bundle = bundle(&args.dir, &authority, &subject, Some(&cluster), &address)?;
    let dir = args.dir.display();
    println!("wrote {dir}/{CONFIG_FILE}        the commented configuration");
    println!(
        "wrote {dir}/{CA_CERT}, {CA_KEY}          a local certificate authority: keep {CA_KEY} secret"
    );
    println!("wrote {dir}/server.crt, server.key  for {}", hosts.join(", "));
    println!("wrote {}/  the client bundle of cluster {cluster}", bundle.display());
    if args.unencrypted {
        println!("encryption at rest is OFF");
    } else {
        println!("wrote {dir}/{IDENTITY_FILE}   the key of all backups, for {recipient}");
        println!();
        println!("KEEP A COPY OF {dir}/{IDENTITY_FILE} IN ANOTHER PLACE, and keep it secret:");
        println!("whoever has it can read every backup, and without it nobody can.");
    }
    println!();
    println!("next: klio-server run -c {dir}/{CONFIG_FILE}");
    println!("then, beside PostgreSQL, with the bundle copied there:");
    println!("      klio check -c {}/klio.toml", bundle.display());
    Ok(())
}

/// `https://host:port`, with brackets if the host is an IPv6 address.
pub fn address(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("https://[{host}]:{port}")
    } else {
        format!("https://{host}:{port}")
    }
}

/// A host as it appears in a certificate: the brackets of an IPv6 address belong only to a URL.
fn bare(host: &str) -> String {
    let inner = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    inner.filter(|inner| inner.contains(':')).unwrap_or(host).to_owned()
}

fn private_dir(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("create directory {}", dir.display()))
}

/// Writes a client bundle below `clients/`; returns its directory.
pub fn bundle(
    dir: &Path,
    authority: &pki::Pair,
    subject: &Subject,
    cluster: Option<&ClusterName>,
    address: &str,
) -> anyhow::Result<PathBuf> {
    let (Subject::Client(name) | Subject::Person(name, _)) = subject;
    let directory = dir.join("clients").join(name);
    if directory.join("client.crt").exists() {
        bail!("{} exists already; hint: move it away to issue a new one", directory.display());
    }
    private_dir(&directory)?;
    let pair = pki::issue_client(authority, subject)?;
    pki::write_new(&directory.join("ca.crt"), &authority.cert, false)?;
    pki::write_new(&directory.join("client.crt"), &pair.cert, false)?;
    pki::write_new(&directory.join("client.key"), &pair.key, true)?;
    pki::write_new(&directory.join("klio.toml"), &client_text(cluster, address), true)?;
    Ok(directory)
}

fn client_text(cluster: Option<&ClusterName>, address: &str) -> String {
    let cluster = cluster.map_or_else(
        || {
            "# cluster = \"main\"   # this certificate has no cluster of its own: name one here or with --cluster"
                .into()
        },
        |c| format!("cluster = \"{c}\""),
    );
    format!(
        r#"# Configuration of klio. Every setting: klio help config
{cluster}

[server]
address = "{address}"
ca = "ca.crt"           # paths are relative to this file
cert = "client.crt"
key = "client.key"

[postgres]
# A libpq connection string or URL; PG* variables and ~/.pgpass apply as well.
# The role needs REPLICATION. Without a dsn the PG* variables alone decide.
# dsn = "host=/var/run/postgresql user=postgres"
slot = "klio"

[stream]
# When PostgreSQL has removed WAL before it was received: "record" the gap and go on, or "stop".
on_gap = "record"
"#
    )
}

fn config_text(args: &Args, address: &str) -> String {
    let data = args.data_dir.as_ref().map_or_else(|| "data".into(), |d| d.display().to_string());
    let (listen, admin) = (args.listen, args.admin_listen);
    let encryption = encryption_text(args);
    format!(
        r#"# Configuration of klio-server. Paths are relative to this file.
# Every setting can also be given as a variable: KLIO_TIER2__URL for url in [tier2].

# Tier 1: received WAL is durable here before it is acknowledged. The queue lives here too.
data_dir = "{data}"

# Where sidecars connect, and the address that client bundles carry.
listen = "{listen}"
public_address = "{address}"

[tls]
cert = "server.crt"       # read again when the files change
key = "server.key"
client_ca = "ca.crt"      # whose client certificates are accepted

# Certificates of another authority: which common name may use which cluster, or has which role (observer, operator,
# admin). Read again when this file changes.
# [[auth.map]]
# common_name = "db1.example.com"
# cluster = "main"

{encryption}
[admin]
listen = "{admin}"        # /livez, /readyz, /metrics

# Tier 2: the bucket. Without it WAL stays on tier 1, and is archived when this is added.
# [tier2]
# url = "s3://bucket/prefix"          # also gs://, az://, file:///directory
# endpoint = "https://s3.example.com" # S3-compatible stores
# region = "eu-central-1"
# access_key_id = "..."               # without: the ambient credentials
# secret_access_key = "..."           # or KLIO_TIER2__SECRET_ACCESS_KEY

[wal]
window_bytes = 8388608    # most WAL a sidecar sends beyond what is acknowledged
seal_workers = 2

# The queue is a nats-server that klio-server starts itself. To use an existing one:
# [queue]
# url = "tls://nats.example.com:4222"

# Metrics and traces follow the standard OTEL_* variables, for example
# OTEL_METRICS_EXPORTER=prometheus, OTEL_TRACES_EXPORTER=otlp.
"#
    )
}

fn encryption_text(args: &Args) -> String {
    if args.unencrypted {
        return "[encryption]\noff = true                # WAL and the keys of base backups are stored plain\n"
            .into();
    }
    let extra = if args.recipients.is_empty() {
        "# recipients = [\"age1...\"]  # more public keys, such as that of an offline recovery identity".into()
    } else {
        format!("recipients = {:?}", args.recipients)
    };
    format!(
        r#"# Encryption at rest: this age identity opens everything. Keep a copy of it in another place.
[encryption]
identity_file = "{IDENTITY_FILE}"
{extra}
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::os::unix::fs::PermissionsExt;

    #[derive(Parser)]
    struct Wrap {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn init_writes_a_configuration_that_loads_and_never_overwrites() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("k");
        let args = Wrap::parse_from(["x", target.to_str().unwrap(), "--cluster", "pg-1"]).args;
        run(&args).unwrap();
        let config = crate::config::Config::load(&target.join(CONFIG_FILE)).unwrap();
        assert!(config.at_rest().unwrap().is_on());
        let identity = fs::metadata(target.join(IDENTITY_FILE)).unwrap();
        assert_eq!(identity.permissions().mode() & 0o777, 0o600);
        let config_mode = fs::metadata(target.join(CONFIG_FILE)).unwrap().permissions().mode();
        assert_eq!(config_mode & 0o777, 0o600, "credentials of the bucket are written into it");
        assert!(config.tls.unwrap().load().is_ok());
        assert_eq!(config.data_dir, target.join("data"));
        assert!(target.join("clients/klio@pg-1/klio.toml").exists());
        assert!(run(&args).unwrap_err().to_string().contains("exists already"));
    }

    #[test]
    fn without_encryption_the_configuration_says_so() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("k");
        let args = Wrap::parse_from(["x", target.to_str().unwrap(), "--unencrypted"]).args;
        run(&args).unwrap();
        let config = crate::config::Config::load(&target.join(CONFIG_FILE)).unwrap();
        assert!(config.encryption.off && config.encryption.identity_file.is_none());
        assert!(!target.join(IDENTITY_FILE).exists());
    }

    #[test]
    fn further_recipients_are_kept_and_a_wrong_one_writes_nothing() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("k");
        let parse = |recipient: &str| {
            Wrap::parse_from(["x", target.to_str().unwrap(), "--recipient", recipient]).args
        };
        assert!(run(&parse("age1nonsense")).is_err());
        assert!(!target.exists());
        let offline = Keys::generate().1;
        run(&parse(&offline)).unwrap();
        let config = crate::config::Config::load(&target.join(CONFIG_FILE)).unwrap();
        let keys = config.at_rest().unwrap();
        assert_eq!(keys.writing().unwrap().recipients()[1], offline);
    }

    #[test]
    fn an_ipv6_host_gets_brackets() {
        assert_eq!(address("::1", 7), "https://[::1]:7");
        assert_eq!(address(&bare("[::1]"), 7), "https://[::1]:7");
        assert_eq!((bare("[db]"), bare("db")), ("[db]".into(), "db".into()));
        assert_eq!(address("db", 7), "https://db:7");
    }
}
