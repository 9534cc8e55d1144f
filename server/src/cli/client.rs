//! `klio-server client NAME@CLUSTER`: issues another client bundle, signed by the local authority.

use super::init::{self, CONFIG_FILE};
use crate::{
    access::{pki, roles::RoleName},
    config::Config,
};
use anyhow::{Context, bail};
use klio_storage::layout::ClusterName;
use std::path::PathBuf;

/// Arguments of `client`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name for the certificate: NAME@CLUSTER, or only NAME with --role or --admin
    pub name: String,
    /// Configuration file of the server; ca.crt and ca.key are in the same directory
    #[arg(short, long, env = "KLIO_CONFIG", default_value = CONFIG_FILE)]
    pub config: PathBuf,
    /// Role without a cluster: an observer sees the status of every cluster and no data, an operator may also request
    /// verification and maintenance, an admin may also read WAL
    #[arg(long, value_parser = role, conflicts_with = "admin")]
    pub role: Option<RoleName>,
    /// Same as --role admin
    #[arg(long)]
    pub admin: bool,
}

fn role(text: &str) -> Result<RoleName, String> {
    let of_people = |role: &RoleName| role.unit().is_some() && role.as_str() == text;
    let found = RoleName::ALL.into_iter().find(of_people);
    found.ok_or_else(|| "expected observer, operator or admin".into())
}

/// Writes the bundle.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (subject, cluster) = subject(args)?;
    let config = Config::load(&args.config)?;
    let dir = args.config.parent().unwrap_or(std::path::Path::new("."));
    let authority = pki::read_authority(dir)
        .context("read the authority of klio-server init, which signs client bundles; hint: with another authority, issue a certificate there with common name NAME@CLUSTER")?;
    let address = config
        .public_address
        .clone()
        .unwrap_or_else(|| init::address(&config.listen.ip().to_string(), config.listen.port()));
    let directory = init::bundle(dir, &authority, &subject, cluster.as_ref(), &address)?;
    println!("wrote {}/  copy it to where klio runs", directory.display());
    Ok(())
}

fn subject(args: &Args) -> anyhow::Result<(pki::Subject, Option<ClusterName>)> {
    let plain = |name: &str| {
        !name.is_empty()
            && name.len() <= 63
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let role = args.role.or(args.admin.then_some(RoleName::Admin));
    match (args.name.split_once('@'), role) {
        (Some((name, cluster)), None) if plain(name) => {
            let cluster: ClusterName = cluster.parse()?;
            Ok((pki::Subject::Client(args.name.clone()), Some(cluster)))
        }
        (None, Some(role)) if plain(&args.name) => {
            Ok((pki::Subject::Person(args.name.clone(), role), None))
        }
        (_, Some(_)) => bail!(
            "expected NAME of letters, digits, - or _ with --role or --admin, found {:?}",
            args.name
        ),
        _ => {
            bail!("expected NAME@CLUSTER, found {:?}; hint: klio-server client app@main", args.name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, admin: bool) -> anyhow::Result<(pki::Subject, Option<ClusterName>)> {
        subject(&Args { name: name.into(), config: PathBuf::new(), role: None, admin })
    }

    #[test]
    fn names_that_would_leave_the_directory_or_mean_nothing_are_refused() {
        assert!(read("app@pg-1", false).is_ok());
        assert!(read("ops", true).is_ok());
        for bad in ["../x@pg", "@pg", "app@", "app", "app@../x", "a/b@pg"] {
            assert!(read(bad, false).is_err(), "{bad:?}");
        }
        assert!(read("ops@pg", true).is_err());
        assert!(role("observer").is_ok() && role("tenant").is_err() && role("root").is_err());
    }
}
