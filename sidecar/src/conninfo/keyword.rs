//! Every keyword that libpq knows, the environment variable for it, and what Klio does with it.
//!
//! A keyword that asks for a protection that Klio does not have (revocation lists, `requirepeer`, …) is refused, not ignored.

/// What Klio does with a keyword.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// `build.rs` uses the value.
    Read,
    /// Accepts these values and ignores them; with an empty list, accepts and ignores any value.
    Only(&'static [&'static str]),
    /// Refuses it; the text says what to do instead.
    Refused(&'static str),
}

#[derive(Debug)]
pub(super) struct Keyword {
    pub name: &'static str,
    /// The environment variable for this keyword.
    pub env: Option<&'static str>,
    pub used: Use,
}

const fn read(name: &'static str, env: &'static str) -> Keyword {
    Keyword { name, env: Some(env), used: Use::Read }
}
const fn plain(name: &'static str) -> Keyword {
    Keyword { name, env: None, used: Use::Read }
}
const fn only(name: &'static str, env: &'static str, values: &'static [&'static str]) -> Keyword {
    Keyword { name, env: Some(env), used: Use::Only(values) }
}
const fn refused(name: &'static str, env: &'static str, why: &'static str) -> Keyword {
    Keyword { name, env: Some(env), used: Use::Refused(why) }
}
const fn ignored(name: &'static str) -> Keyword {
    Keyword { name, env: None, used: Use::Only(&[]) }
}

const NO_GSS: &str = "klio speaks TLS, not GSSAPI";
const NO_CRL: &str = "klio does not check revocation lists; remove the authority instead";
const NO_KEYS: &str = "give the password itself";
const NO_OAUTH: &str = "use a password or a client certificate";

/// All keywords up to PostgreSQL 18.
pub(super) const KEYWORDS: &[Keyword] = &[
    read("host", "PGHOST"),
    read("hostaddr", "PGHOSTADDR"),
    read("port", "PGPORT"),
    read("dbname", "PGDATABASE"),
    read("user", "PGUSER"),
    read("password", "PGPASSWORD"),
    read("passfile", "PGPASSFILE"),
    read("connect_timeout", "PGCONNECT_TIMEOUT"),
    read("application_name", "PGAPPNAME"),
    plain("fallback_application_name"),
    read("options", "PGOPTIONS"),
    read("sslmode", "PGSSLMODE"),
    read("sslrootcert", "PGSSLROOTCERT"),
    read("sslcert", "PGSSLCERT"),
    read("sslkey", "PGSSLKEY"),
    read("sslsni", "PGSSLSNI"),
    read("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    read("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    read("channel_binding", "PGCHANNELBINDING"),
    read("target_session_attrs", "PGTARGETSESSIONATTRS"),
    read("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    plain("keepalives"),
    plain("keepalives_idle"),
    plain("keepalives_interval"),
    plain("keepalives_count"),
    plain("tcp_user_timeout"),
    only("gssencmode", "PGGSSENCMODE", &["disable", "prefer"]),
    read("sslnegotiation", "PGSSLNEGOTIATION"),
    read("require_auth", "PGREQUIREAUTH"),
    read("service", "PGSERVICE"),
    read("servicefile", "PGSERVICEFILE"),
    only("sslcertmode", "PGSSLCERTMODE", &["allow"]),
    only("sslcompression", "PGSSLCOMPRESSION", &["0"]),
    only("min_protocol_version", "PGMINPROTOCOLVERSION", &["3.0"]),
    only("max_protocol_version", "PGMAXPROTOCOLVERSION", &["3.0", "3.2", "latest"]),
    // primary_conninfo may contain it; klio sets it itself for each connection.
    ignored("replication"),
    // The encoding is always UTF8: klio only needs ASCII.
    ignored("client_encoding"),
    ignored("krbsrvname"),
    ignored("gsslib"),
    ignored("gssdelegation"),
    refused("sslpassword", "PGSSLPASSWORD", "store the key unencrypted, mode 0600"),
    refused("sslcrl", "PGSSLCRL", NO_CRL),
    refused("sslcrldir", "PGSSLCRLDIR", NO_CRL),
    refused("sslkeylogfile", "PGSSLKEYLOGFILE", "session keys are not written to files"),
    refused("requirepeer", "PGREQUIREPEER", "use TLS with sslmode=verify-full"),
    refused("requiressl", "PGREQUIRESSL", "use sslmode=require"),
    refused("scram_client_key", "PGSCRAMCLIENTKEY", NO_KEYS),
    refused("scram_server_key", "PGSCRAMSERVERKEY", NO_KEYS),
    refused("oauth_issuer", "PGOAUTHISSUER", NO_OAUTH),
    refused("oauth_client_id", "PGOAUTHCLIENTID", NO_OAUTH),
    refused("oauth_client_secret", "PGOAUTHCLIENTSECRET", NO_OAUTH),
    refused("oauth_scope", "PGOAUTHSCOPE", NO_OAUTH),
    refused("requiregss", "PGREQUIREGSS", NO_GSS),
];

pub(super) fn find(name: &str) -> Option<&'static Keyword> {
    KEYWORDS.iter().find(|k| k.name == name)
}
