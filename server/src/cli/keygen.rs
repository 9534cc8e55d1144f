//! `klio-server keygen`: creates an age identity. Overwrites nothing.

use crate::access::pki;
use anyhow::Context;
use klio_storage::crypt::IdentityText;
use std::{io::Write, path::PathBuf};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Arguments of `keygen`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write the identity to this new file (mode 0600) instead of standard output
    #[arg(short, long)]
    pub out: Option<PathBuf>,
}

/// A new identity's file, and its public recipient.
pub fn generate() -> (IdentityText, String) {
    let now = OffsetDateTime::now_utc().replace_nanosecond(0);
    let now = now.ok().and_then(|now| now.format(&Rfc3339).ok());
    IdentityText::generate(&now.unwrap_or_default())
}

/// Writes or prints a new identity.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let (text, recipient) = generate();
    let Some(path) = &args.out else {
        std::io::stdout().write_all(text.expose().as_bytes()).context("print the identity")?;
        eprintln!("public recipient: {recipient}");
        return Ok(());
    };
    pki::write_new(path, text.expose(), true)?;
    println!("{recipient}");
    eprintln!(
        "wrote {}: whoever has it can read every backup, and without it nobody can",
        path.display()
    );
    Ok(())
}
