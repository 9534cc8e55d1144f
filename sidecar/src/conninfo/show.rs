//! A connection as one line for logs: a valid connection string, except for the stars in place of the password.

use super::{ConnInfo, HostTarget, RootCert, SslMode};
use std::fmt;

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        })
    }
}

/// Keyword form. A password is shown as `***`.
impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.hosts.iter().map(|h| match &h.target {
            HostTarget::Unix(dir) => dir.display().to_string(),
            HostTarget::Tcp { name, .. } => name.clone(),
        });
        let ports = self.hosts.iter().map(|h| h.port.to_string());
        write!(f, "host={}", quote(&names.collect::<Vec<_>>().join(",")))?;
        let addrs = self.hosts.iter().map(|h| match &h.target {
            HostTarget::Tcp { addr: Some(addr), .. } => addr.to_string(),
            _ => String::new(),
        });
        let addrs: Vec<_> = addrs.collect();
        if addrs.iter().any(|a| !a.is_empty()) {
            write!(f, " hostaddr={}", addrs.join(","))?;
        }
        write!(f, " port={} user={}", ports.collect::<Vec<_>>().join(","), quote(&self.user))?;
        if let Some(password) = &self.password {
            write!(f, " password={password}")?;
        }
        if let Some(dbname) = &self.dbname {
            write!(f, " dbname={}", quote(dbname))?;
        }
        write!(f, " application_name={} sslmode={}", quote(&self.application_name), self.tls.mode)?;
        match &self.tls.root {
            RootCert::System => f.write_str(" sslrootcert=system"),
            RootCert::File(path) => write!(f, " sslrootcert={}", quote(&path.to_string_lossy())),
            RootCert::None | RootCert::DefaultFile(_) => Ok(()),
        }?;
        for (name, file) in [("sslcert", &self.tls.cert), ("sslkey", &self.tls.key)] {
            if let Some(file) = file.as_ref().filter(|f| f.explicit) {
                write!(f, " {name}={}", quote(&file.path.to_string_lossy()))?;
            }
        }
        Ok(())
    }
}

pub(super) fn quote(value: &str) -> String {
    let plain = |c: char| !c.is_whitespace() && c != '\'' && c != '\\';
    if !value.is_empty() && value.chars().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}
