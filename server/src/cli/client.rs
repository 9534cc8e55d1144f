//! `klio-server client NAME@CLUSTER`: a further bundle, signed by the local authority.

use super::init::{self, CONFIG_FILE};
use crate::{config::Config, pki};
use anyhow::{Context, bail};
use klio_storage::layout::ClusterName;
use std::path::PathBuf;

/// Arguments of `client`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Who it is for: NAME@CLUSTER, or only NAME with --admin.
    pub name: String,
    /// The server's configuration file; ca.crt and ca.key lie beside it.
    #[arg(short, long, env = "KLIO_CONFIG", default_value = CONFIG_FILE)]
    pub config: PathBuf,
    /// An administrator: reads every cluster, writes none.
    #[arg(long)]
    pub admin: bool,
}

/// Writes the bundle.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (subject, cluster) = subject(args)?;
    let config = Config::load(&args.config)?;
    let dir = args.config.parent().unwrap_or(std::path::Path::new("."));
    let authority = pki::read_authority(dir)
        .context("client bundles are signed by the authority of klio-server init; with another authority issue a certificate there, common name NAME@CLUSTER")?;
    let address = config
        .public_address
        .clone()
        .unwrap_or_else(|| init::address(&config.listen.ip().to_string(), config.listen.port()));
    let folder = init::bundle(dir, &authority, &subject, cluster.as_ref(), &address)?;
    println!("wrote {}/  copy it to where klio runs", folder.display());
    Ok(())
}

fn subject(args: &Args) -> anyhow::Result<(pki::Subject, Option<ClusterName>)> {
    let plain = |name: &str| {
        !name.is_empty()
            && name.len() <= 63
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    match (args.name.split_once('@'), args.admin) {
        (Some((name, cluster)), false) if plain(name) => {
            let cluster: ClusterName = cluster.parse()?;
            Ok((pki::Subject::Client(args.name.clone()), Some(cluster)))
        }
        (None, true) if plain(&args.name) => Ok((pki::Subject::Admin(args.name.clone()), None)),
        (_, true) => {
            bail!("expected NAME of letters, digits, - or _ with --admin, found {:?}", args.name)
        }
        _ => {
            bail!("expected NAME@CLUSTER, found {:?}; hint: klio-server client app@main", args.name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, admin: bool) -> anyhow::Result<(pki::Subject, Option<ClusterName>)> {
        subject(&Args { name: name.into(), config: PathBuf::new(), admin })
    }

    #[test]
    fn names_that_would_leave_the_folder_or_mean_nothing_are_refused() {
        assert!(read("app@pg-1", false).is_ok());
        assert!(read("ops", true).is_ok());
        for bad in ["../x@pg", "@pg", "app@", "app", "app@../x", "a/b@pg"] {
            assert!(read(bad, false).is_err(), "{bad:?}");
        }
        assert!(read("ops@pg", true).is_err());
    }
}
