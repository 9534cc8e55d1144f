//! Client bundles that `klio-server client` would not write: expired ones, and those of other authorities.

use crate::{pki::Pair, site::Site};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

/// Writes a bundle with this certificate that trusts the site's own authority; returns its configuration file.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn write(site: &Site, name: &str, pair: &Pair, cluster: &str) -> PathBuf {
    let dir = site.scratch(name);
    fs::create_dir_all(&dir).expect("make a directory");
    let _ = pair.write(&dir, "client");
    fs::copy(site.bundle().with_file_name("ca.crt"), dir.join("ca.crt")).expect("copy ca.crt");
    let text = format!(
        "cluster = \"{cluster}\"\n[server]\naddress = \"https://localhost:{}\"\n",
        site.port()
    );
    let config = dir.join("klio.toml");
    fs::write(&config, text).expect("write klio.toml");
    config
}

/// Has the server accept client certificates of one more authority (PEM).
///
/// # Panics
/// When the file cannot be written.
pub fn trust(site: &Site, authority: &str) {
    append(&site.dir().join("ca.crt"), authority);
}

/// Adds text to the end of the server's configuration.
///
/// # Panics
/// When the file cannot be written.
pub fn configure(site: &Site, text: &str) {
    append(&site.dir().join("klio-server.toml"), text);
}

fn append(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new().append(true).open(path).expect("open a file of the site");
    write!(file, "\n{text}").expect("write to a file of the site");
}
