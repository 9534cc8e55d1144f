//! Builds a [`ConnInfo`] from keywords and variables.

use super::{
    ChannelBinding, ClientFile, ConnInfo, ConnInfoError, Env, Host, HostTarget, Keepalive,
    Password, RootCert, SslMode, TargetSessionAttrs, TlsSettings,
    auth::RequireAuth,
    host::DEFAULT_SOCKET_DIRS,
    keyword::{self, KEYWORDS, Use},
    service,
    text::Pairs,
};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

const DEFAULT_PORT: u16 = 5432;
/// libpq waits for ever by default, but a daemon that follows failovers must try the next host.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The name that the server shows for our sessions by default.
const DEFAULT_APPLICATION_NAME: &str = "klio";

/// The user this process runs as, from the system's list of users.
pub fn os_user() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let list = std::fs::read_to_string("/etc/passwd").ok()?;
    let found = list.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    found.filter(|name| !name.is_empty())
}

/// All values that are not empty, each with its origin for error messages.
struct Values(BTreeMap<&'static str, (String, String)>);

pub(super) fn build(
    pairs: Pairs,
    env: Env<'_>,
    os_user: Option<&str>,
) -> Result<ConnInfo, ConnInfoError> {
    let values = Values::collect(pairs, env)?;
    let home = env("HOME").filter(|h| !h.is_empty()).map(PathBuf::from);
    let user = values.text("user").or_else(|| os_user.map(str::to_owned));
    let user = user.or_else(|| env("USER").filter(|u| !u.is_empty()));
    let named = values.text("application_name");
    let named = named.or_else(|| values.text("fallback_application_name"));
    let default_passfile = || home.as_ref().map(|h| h.join(".pgpass"));
    Ok(ConnInfo {
        hosts: hosts(&values)?,
        shuffle_hosts: values
            .choice("load_balance_hosts", &[("disable", false), ("random", true)])?
            .unwrap_or(false),
        user: user.ok_or(ConnInfoError::NoUser)?,
        password: values.text("password").and_then(Password::new),
        passfile: values.text("passfile").map(PathBuf::from).or_else(default_passfile),
        dbname: values.text("dbname"),
        application_name: named.unwrap_or_else(|| DEFAULT_APPLICATION_NAME.into()),
        options: values.text("options"),
        connect_timeout: match values.number("connect_timeout", 0, 86_400)? {
            None => Some(DEFAULT_CONNECT_TIMEOUT),
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds)),
        },
        tls: tls(&values, home)?,
        channel_binding: values
            .choice(
                "channel_binding",
                &[
                    ("disable", ChannelBinding::Disable),
                    ("prefer", ChannelBinding::Prefer),
                    ("require", ChannelBinding::Require),
                ],
            )?
            .unwrap_or(ChannelBinding::Prefer),
        require_auth: match values.text("require_auth") {
            None => RequireAuth::default(),
            Some(text) => RequireAuth::parse(&text)
                .ok_or_else(|| values.bad("require_auth", RequireAuth::expected()))?,
        },
        target_session_attrs: values
            .choice(
                "target_session_attrs",
                &[
                    ("any", TargetSessionAttrs::Any),
                    ("read-write", TargetSessionAttrs::ReadWrite),
                    ("read-only", TargetSessionAttrs::ReadOnly),
                    ("primary", TargetSessionAttrs::Primary),
                    ("standby", TargetSessionAttrs::Standby),
                    ("prefer-standby", TargetSessionAttrs::PreferStandby),
                ],
            )?
            .unwrap_or(TargetSessionAttrs::Any),
        keepalive: keepalive(&values)?,
        tcp_user_timeout: values
            .number("tcp_user_timeout", 0, u64::from(u32::MAX))?
            .filter(|ms| *ms > 0)
            .map(Duration::from_millis),
    })
}

impl Values {
    fn collect(pairs: Pairs, env: Env<'_>) -> Result<Values, ConnInfoError> {
        let mut values = BTreeMap::new();
        for keyword in KEYWORDS {
            if let Some(variable) = keyword.env
                && let Some(value) = env(variable)
            {
                values.insert(keyword.name, (value, variable.to_owned()));
            }
        }
        let typed = |keyword: &str| {
            let last = pairs.iter().rev().find(|(name, _)| name == keyword);
            let set = values.get(keyword).map(|(value, _): &(String, String)| value.clone());
            last.map(|(_, value)| value.clone()).or(set).filter(|value| !value.is_empty())
        };
        if let Some(name) = typed("service") {
            for (keyword, value) in service::load(&name, typed("servicefile"), env)? {
                if let Some(keyword) = keyword::find(&keyword) {
                    values.insert(keyword.name, (value, format!("service {name}")));
                }
            }
        }
        for (name, value) in pairs {
            let keyword = keyword::find(&name).ok_or(ConnInfoError::UnknownKeyword(name))?;
            values.insert(keyword.name, (value, "connection string".to_owned()));
        }
        values.retain(|_, (value, _)| !value.is_empty());
        for keyword in KEYWORDS {
            let Some((value, place)) = values.get(keyword.name) else { continue };
            match keyword.used {
                Use::Refused(why) => {
                    let (place, keyword) = (place.clone(), keyword.name);
                    return Err(ConnInfoError::Unsupported { place, keyword, why });
                }
                Use::Only(allowed) if !allowed.is_empty() && !allowed.contains(&&**value) => {
                    return Err(ConnInfoError::Value {
                        place: place.clone(),
                        keyword: keyword.name,
                        expected: allowed.join(" or "),
                        found: value.clone(),
                    });
                }
                Use::Read | Use::Only(_) => {}
            }
        }
        Ok(Values(values))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.0.get(name).map(|(value, _)| value.clone())
    }

    fn bad(&self, name: &'static str, expected: String) -> ConnInfoError {
        let (found, place) = self.0.get(name).cloned().unwrap_or_default();
        ConnInfoError::Value { place, keyword: name, expected, found }
    }

    fn number(&self, name: &'static str, min: u64, max: u64) -> Result<Option<u64>, ConnInfoError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.trim().parse::<u64>() {
            Ok(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.bad(name, format!("a number from {min} to {max}"))),
        }
    }

    fn choice<T: Copy>(
        &self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, ConnInfoError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
                Err(self.bad(name, format!("one of {}", words.join(", "))))
            }
        }
    }
}

fn list(text: Option<String>) -> Vec<String> {
    text.map(|t| t.split(',').map(|s| s.trim().to_owned()).collect()).unwrap_or_default()
}

fn hosts(values: &Values) -> Result<Vec<Host>, ConnInfoError> {
    let (names, addrs, ports) =
        (list(values.text("host")), list(values.text("hostaddr")), list(values.text("port")));
    let count = names.len().max(addrs.len());
    if !names.is_empty() && !addrs.is_empty() && names.len() != addrs.len() {
        return Err(ConnInfoError::Conflict(format!(
            "expected as many values of hostaddr as of host, found {} and {}",
            addrs.len(),
            names.len()
        )));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(ConnInfoError::Conflict(format!(
            "expected one port, or as many as hosts, found {} and {count}",
            ports.len()
        )));
    }
    let mut hosts = Vec::new();
    for index in 0..count.max(1) {
        let port = port(values, ports.get(index).or(ports.first()))?;
        let name = names.get(index).filter(|n| !n.is_empty());
        let addr = match addrs.get(index).filter(|a| !a.is_empty()) {
            None => None,
            Some(addr) => match addr.parse() {
                Ok(ip) => Some(ip),
                Err(_) => return Err(values.bad("hostaddr", "an IPv4 or IPv6 address".into())),
            },
        };
        let target = match (name, addr) {
            (Some(name), None) if name.starts_with('/') => HostTarget::Unix(name.into()),
            (Some(name), None) if name.starts_with('@') => {
                return Err(values.bad("host", "a name, an address or a directory".into()));
            }
            (Some(name), addr) => HostTarget::Tcp { name: name.clone(), addr },
            (None, Some(addr)) => HostTarget::Tcp { name: addr.to_string(), addr: Some(addr) },
            (None, None) => {
                let unix = |dir: &str| Host { target: HostTarget::Unix(dir.into()), port };
                hosts.extend(DEFAULT_SOCKET_DIRS.map(unix));
                continue;
            }
        };
        hosts.push(Host { target, port });
    }
    Ok(hosts)
}

fn port(values: &Values, text: Option<&String>) -> Result<u16, ConnInfoError> {
    match text.filter(|t| !t.is_empty()) {
        None => Ok(DEFAULT_PORT),
        Some(text) => match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(values.bad("port", "a number from 1 to 65535".into())),
        },
    }
}

fn tls(values: &Values, home: Option<PathBuf>) -> Result<TlsSettings, ConnInfoError> {
    let modes = [
        SslMode::Disable,
        SslMode::Allow,
        SslMode::Prefer,
        SslMode::Require,
        SslMode::VerifyCa,
        SslMode::VerifyFull,
    ];
    let names = modes.map(|m| m.to_string());
    let choices: Vec<_> = names.iter().map(String::as_str).zip(modes).collect();
    let mode = values.choice("sslmode", &choices)?;
    let in_home = |name: &str| home.as_ref().map(|h| h.join(".postgresql").join(name));
    let root = match values.text("sslrootcert") {
        Some(text) if text == "system" => RootCert::System,
        Some(text) => RootCert::File(text.into()),
        None => in_home("root.crt").map_or(RootCert::None, RootCert::DefaultFile),
    };
    // libpq's rule: with the system's authorities, anything less than verify-full would protect nothing.
    let mode = match (&root, mode) {
        (RootCert::System, Some(mode)) if mode != SslMode::VerifyFull => {
            return Err(values.bad("sslmode", "verify-full with sslrootcert=system".into()));
        }
        (RootCert::System, _) => SslMode::VerifyFull,
        (_, mode) => mode.unwrap_or(SslMode::Prefer),
    };
    let file = |keyword: &str, default: &str| match values.text(keyword) {
        Some(path) => Some(ClientFile { path: path.into(), explicit: true }),
        None => in_home(default).map(|path| ClientFile { path, explicit: false }),
    };
    let (tls13_only, tls12_only) = versions(values)?;
    let direct =
        values.choice("sslnegotiation", &[("postgres", false), ("direct", true)])?.unwrap_or(false);
    // libpq's rule: with direct negotiation, the server cannot be asked whether it supports TLS, so TLS must be required.
    if direct && matches!(mode, SslMode::Disable | SslMode::Allow | SslMode::Prefer) {
        return Err(values.bad("sslnegotiation", "sslmode=require or stronger with direct".into()));
    }
    Ok(TlsSettings {
        mode,
        root,
        cert: file("sslcert", "postgresql.crt"),
        key: file("sslkey", "postgresql.key"),
        direct,
        sni: values.choice("sslsni", &[("0", false), ("1", true)])?.unwrap_or(true),
        tls13_only,
        tls12_only,
    })
}

fn versions(values: &Values) -> Result<(bool, bool), ConnInfoError> {
    const FLOOR: [(&str, bool); 4] =
        [("TLSv1", false), ("TLSv1.1", false), ("TLSv1.2", false), ("TLSv1.3", true)];
    // Below 1.2 there is no version that klio supports.
    const CEILING: [(&str, bool); 2] = [("TLSv1.2", true), ("TLSv1.3", false)];
    let min = values.choice("ssl_min_protocol_version", &FLOOR)?.unwrap_or(false);
    let max = values.choice("ssl_max_protocol_version", &CEILING)?.unwrap_or(false);
    if min && max {
        return Err(ConnInfoError::Conflict(
            "expected ssl_min_protocol_version up to ssl_max_protocol_version, \
             found TLSv1.3 and TLSv1.2"
                .into(),
        ));
    }
    Ok((min, max))
}

fn keepalive(values: &Values) -> Result<Option<Keepalive>, ConnInfoError> {
    let on = values.choice("keepalives", &[("0", false), ("1", true)])?.unwrap_or(true);
    let seconds = |name| -> Result<Option<Duration>, ConnInfoError> {
        let found = values.number(name, 0, 32_767)?;
        Ok(found.filter(|s| *s > 0).map(Duration::from_secs))
    };
    let count = values.number("keepalives_count", 0, 127)?.filter(|n| *n > 0);
    let keepalive = Keepalive {
        idle: seconds("keepalives_idle")?,
        interval: seconds("keepalives_interval")?,
        count: count.and_then(|n| u32::try_from(n).ok()),
    };
    Ok(on.then_some(keepalive))
}
