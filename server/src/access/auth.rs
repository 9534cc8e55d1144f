//! P8: the client certificate names the caller, and every call is checked against it and the table in `roles`.
//!
//! | subject | role |
//! |---|---|
//! | common name `NAME@CLUSTER` | tenant of that cluster |
//! | organisational unit `klio-observer`, `klio-operator`, `klio-admin` | that role |
//! | a `[[auth.map]]` entry for the common name | what the entry says, whatever else the subject says |
//!
//! Anything else is refused. A unit counts only in certificates of the authority that `klio-server init` created:
//! other authorities issue units for their own purposes, and whoever may write a request there must not become an
//! administrator here. `[auth] trust_units` overrides this. Chain and role are checked again on each call and during
//! long ones, against the current authorities and the current map.

use super::roles::{Role, RoleName, Rpc};
use super::tls::Loaded;
use klio_proto::Code;
use klio_storage::layout::ClusterName;
use rustls::pki_types::CertificateDer;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{
    Extensions, Request, Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo},
};
use x509_parser::prelude::{FromDer, X509Certificate};

/// How often the configuration file is checked for changes; the same as for certificates.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// `[auth]`
#[derive(Debug, Clone, Default, serde::Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Roles for certificates whose subject does not give one.
    pub map: Vec<MapEntry>,
    /// Organisational units count in certificates of every authority in `tls.client_ca`.
    pub trust_units: bool,
}

/// Gives a certificate of a foreign authority a role.
#[derive(Debug, Clone, serde::Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct MapEntry {
    /// The subject's common name, compared exactly.
    pub common_name: String,
    /// The cluster, for a tenant.
    pub cluster: Option<ClusterName>,
    /// The role, for a caller without a cluster.
    pub role: Option<RoleName>,
    /// The same as `role = "admin"`.
    #[serde(default)]
    pub admin: bool,
}

impl MapEntry {
    /// The role that the entry gives; `None` when it gives none or more than one.
    fn given(&self) -> Option<Role> {
        match (&self.cluster, self.role, self.admin) {
            (Some(cluster), None | Some(RoleName::Tenant), false) => {
                Some(Role::Tenant(cluster.clone()))
            }
            (None, Some(RoleName::Observer), false) => Some(Role::Observer),
            (None, Some(RoleName::Operator), false) => Some(Role::Operator),
            (None, Some(RoleName::Admin), _) | (None, None, true) => Some(Role::Admin),
            _ => None,
        }
    }
}

impl AuthConfig {
    pub fn validate(&self) -> Vec<String> {
        let bad = self.map.iter().filter(|entry| entry.given().is_none());
        let mut problems: Vec<String> = bad
            .map(|entry| {
                format!(
                    "auth.map {:?}: expected either a cluster or role = \"observer\", \"operator\" or \"admin\"",
                    entry.common_name
                )
            })
            .collect();
        let named = self.map.iter().filter_map(|entry| Some((entry, entry.cluster.as_ref()?)));
        for (entry, cluster) in named.filter(|(_, cluster)| cluster.number().is_some()) {
            problems.push(format!(
                "auth.map {:?}: expected the name of a cluster, found that of a generation, {:?}; hint: a certificate belongs to its cluster with all generations: cluster = {:?}",
                entry.common_name,
                cluster.as_str(),
                cluster.base().as_str()
            ));
        }
        // The first of two entries counts, as in earlier versions.
        for (at, entry) in self.map.iter().enumerate() {
            if self.map[..at].iter().any(|earlier| earlier.common_name == entry.common_name) {
                let name = &entry.common_name;
                tracing::warn!("auth.map {name:?} has two entries; the first one counts");
            }
        }
        problems
    }
}

/// An authenticated caller.
#[derive(Clone)]
pub struct Identity {
    /// The certificate's common name, or `plaintext`.
    pub name: String,
    /// What the caller may access; `None` with unsafe plaintext, which means everything.
    pub role: Option<Role>,
    /// End of the certificate, in Unix seconds; 0 with plaintext.
    pub expires_unix: i64,
    chain: Option<Arc<Vec<CertificateDer<'static>>>>,
}

impl Identity {
    /// Whether the caller may see this cluster.
    pub fn sees(&self, cluster: &ClusterName) -> bool {
        self.role.as_ref().is_none_or(|role| role.sees(cluster))
    }

    /// The cluster that the caller's calls, connections and bytes are counted for; `None` for a caller without a
    /// cluster.
    pub fn tenant(&self) -> Option<&ClusterName> {
        match &self.role {
            Some(Role::Tenant(cluster)) => Some(cluster),
            _ => None,
        }
    }
}

/// Authenticates and authorizes callers. Cheap to clone.
#[derive(Clone)]
pub struct Auth {
    /// `None` when unsafe plaintext is configured.
    tls: Option<watch::Receiver<Arc<Loaded>>>,
    rules: watch::Receiver<Arc<AuthConfig>>,
}

impl Auth {
    /// Uses the current certificates, or `None` for unsafe plaintext, and the current roles.
    pub fn new(
        tls: Option<watch::Receiver<Arc<Loaded>>>,
        rules: watch::Receiver<Arc<AuthConfig>>,
    ) -> Self {
        Self { tls, rules }
    }

    /// The caller of a request.
    pub fn identify<T>(&self, request: &Request<T>) -> Result<Identity, Status> {
        self.identify_by(request.extensions())
    }

    /// The caller, from a request's extensions.
    pub fn identify_by(&self, extensions: &Extensions) -> Result<Identity, Status> {
        if let Some(identity) = extensions.get::<Identity>() {
            return Ok(identity.clone());
        }
        let info = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
        self.identify_chain(info.and_then(|info| info.peer_certs()))
    }

    /// The caller with this certificate chain.
    pub fn identify_chain(
        &self,
        chain: Option<Arc<Vec<CertificateDer<'static>>>>,
    ) -> Result<Identity, Status> {
        if self.tls.is_none() {
            let name = "plaintext".to_owned();
            return Ok(Identity { name, role: None, expires_unix: 0, chain: None });
        }
        let chain = chain.filter(|chain| !chain.is_empty()).ok_or_else(|| {
            Code::Unauthenticated.status("expected a client certificate, found none")
        })?;
        let Subject { name, unit, expires_unix } = subject(&chain[0])?;
        self.verify(&name, &chain)?;
        let role = self.role(&name, unit, &chain)?;
        Ok(Identity { name, role: Some(role), expires_unix, chain: Some(chain) })
    }

    fn verify(&self, name: &str, chain: &[CertificateDer<'_>]) -> Result<(), Status> {
        let Some(tls) = &self.tls else { return Ok(()) };
        tls.borrow().verify(chain).map_err(|error| {
            Code::Unauthenticated.status(format!("verify client certificate {name:?}: {error}"))
        })
    }

    /// Checks an identity again: not expired, authority not removed, role unchanged.
    pub fn recheck(&self, identity: &Identity) -> Result<(), Status> {
        let Some(chain) = &identity.chain else { return Ok(()) };
        let now = self.identify_chain(Some(Arc::clone(chain)))?;
        if now.role == identity.role {
            return Ok(());
        }
        let name = &identity.name;
        Err(Code::Forbidden.status(format!("the role of certificate {name:?} was changed")))
    }

    /// Resolves when the certificates or roles change; never with plaintext. Cancel-safe.
    pub async fn changed(&mut self) {
        let Some(tls) = &mut self.tls else { return std::future::pending().await };
        let certificates = async {
            if tls.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let roles = async {
            if self.rules.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = certificates => {}
            () = roles => {}
        }
    }

    /// The caller and the cluster, if the caller may make this call for the cluster.
    pub fn require<T>(
        &self,
        request: &Request<T>,
        cluster: &str,
        rpc: Rpc,
    ) -> Result<(Identity, ClusterName), Status> {
        let identity = self.identify(request)?;
        let cluster = permit(&identity, cluster, rpc)?;
        Ok((identity, cluster))
    }

    fn role(
        &self,
        name: &str,
        unit: Option<RoleName>,
        chain: &[CertificateDer<'_>],
    ) -> Result<Role, Status> {
        let rules = Arc::clone(&self.rules.borrow());
        if let Some(entry) = rules.map.iter().find(|e| e.common_name == name) {
            // The configuration's validation refuses such an entry; here it gives no role.
            let nothing = || Code::Forbidden.status(format!("[[auth.map]] gives {name:?} no role"));
            return entry.given().ok_or_else(nothing);
        }
        let own = || self.tls.as_ref().is_some_and(|tls| tls.borrow().is_of_own_authority(chain));
        let trusted = unit.filter(|_| rules.trust_units || own());
        match trusted {
            Some(RoleName::Observer) => return Ok(Role::Observer),
            Some(RoleName::Operator) => return Ok(Role::Operator),
            Some(RoleName::Admin) => return Ok(Role::Admin),
            Some(RoleName::Tenant) | None => {}
        }
        let cluster = name.split_once('@').and_then(|(_, cluster)| cluster.parse().ok());
        cluster.map(Role::Tenant).ok_or_else(|| Code::Forbidden.status(stranger(name, unit)))
    }
}

fn stranger(name: &str, unit: Option<RoleName>) -> String {
    match unit.and_then(RoleName::unit) {
        Some(unit) => format!(
            "certificate {name:?}: organisational unit {unit} counts only in certificates of the authority of klio-server init; hint: [[auth.map]] with this common name and a role, or [auth] trust_units = true"
        ),
        None => format!(
            "expected a client certificate with common name NAME@CLUSTER or an [[auth.map]] entry, found {name:?}"
        ),
    }
}

/// The cluster that a call names, if this caller may make the call for it.
pub fn permit(identity: &Identity, cluster: &str, rpc: Rpc) -> Result<ClusterName, Status> {
    let cluster = ClusterName::parse_generation(cluster)
        .map_err(|e| Code::Invalid.status(format!("read request: {e}")))?;
    let Some(role) = &identity.role else { return Ok(cluster) };
    if role.may(rpc, &cluster) {
        return Ok(cluster);
    }
    let name = &identity.name;
    Err(Code::Forbidden.status(match role {
        Role::Tenant(own) if *own != cluster.base() => {
            format!("certificate {name:?} allows cluster {own}, the call names cluster {cluster}")
        }
        _ => {
            let (role, method) = (role.name().as_str(), rpc.method());
            let few = if rpc.roles() == [RoleName::Tenant] { "reading only" } else { "less" };
            format!("certificate {name:?} has the role {role}, which allows {few}: {method} is not for it; hint: docs/access.md has the table")
        }
    }))
}

/// Reads and checks `[auth]` of a configuration file.
pub type ReadRules = fn(&Path) -> Result<AuthConfig, String>;

/// Keeps the newest valid `[auth]` of the configuration file in `current` until cancelled. A file that cannot be used
/// is logged once, and the previous roles stay.
pub async fn reload(
    file: PathBuf,
    read: ReadRules,
    current: watch::Sender<Arc<AuthConfig>>,
    cancel: CancellationToken,
) {
    let mut known = std::fs::read(&file).ok();
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(RELOAD_INTERVAL) => {}
        }
        // The file is gone or just being replaced; the last valid one stays in use.
        let Ok(bytes) = std::fs::read(&file) else { continue };
        if known.as_ref() == Some(&bytes) {
            continue;
        }
        known = Some(bytes);
        take_over(read(&file), &current);
    }
}

fn take_over(read: Result<AuthConfig, String>, current: &watch::Sender<Arc<AuthConfig>>) {
    match read {
        Ok(rules) if rules == **current.borrow() => {}
        Ok(rules) => {
            tracing::info!("using the changed [auth] of the configuration file");
            current.send_replace(Arc::new(rules));
        }
        Err(error) => {
            tracing::warn!(%error, "cannot use the changed configuration file; keeping the previous [auth]");
        }
    }
}

struct Subject {
    name: String,
    unit: Option<RoleName>,
    expires_unix: i64,
}

/// Requires one common name and at most one unit that has a meaning here, because a subject with two of them is
/// ambiguous.
fn subject(der: &CertificateDer<'_>) -> Result<Subject, Status> {
    let refuse =
        |detail: String| Code::Unauthenticated.status(format!("read client certificate: {detail}"));
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| refuse(e.to_string()))?;
    let subject = cert.subject();
    let names: Vec<&str> = subject.iter_common_name().filter_map(|a| a.as_str().ok()).collect();
    let [name] = names[..] else {
        return Err(refuse(format!("expected one common name, found {}", names.len())));
    };
    let units = subject.iter_organizational_unit().filter_map(|a| a.as_str().ok());
    let units: Vec<RoleName> = units.filter_map(RoleName::of_unit).collect();
    if units.len() > 1 {
        return Err(refuse("expected one organisational unit klio-..., found several".into()));
    }
    let expires_unix = cert.validity().not_after.timestamp();
    Ok(Subject { name: name.to_owned(), unit: units.first().copied(), expires_unix })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::pki;
    use rustls::pki_types::pem::PemObject;

    fn identity(role: Option<Role>) -> Identity {
        Identity { name: "x".into(), role, expires_unix: 0, chain: None }
    }

    /// Guards against a bug of other servers, where any client with a valid certificate could read and write any
    /// cluster (P8).
    #[test]
    fn one_clusters_certificate_cannot_touch_another() {
        let own = identity(Some(Role::Tenant("pg-1".parse().unwrap())));
        assert!(permit(&own, "pg-1", Rpc::Receive).is_ok());
        for rpc in Rpc::ALL {
            let status = permit(&own, "pg-2", *rpc).unwrap_err();
            assert_eq!(Code::of(&status), Code::Forbidden);
            assert!(status.message().contains("pg-1") && status.message().contains("pg-2"));
        }
    }

    #[test]
    fn an_administrator_reads_and_writes_nothing_and_gets_no_secret() {
        let admin = identity(Some(Role::Admin));
        assert!(permit(&admin, "pg-1", Rpc::Fetch).is_ok());
        assert!(permit(&admin, "pg-1", Rpc::Maintain).is_ok());
        assert!(permit(&admin, "pg-1", Rpc::Receive).is_err());
        assert!(permit(&admin, "pg-1", Rpc::OpenRepository).is_err());
    }

    #[test]
    fn a_name_with_dots_is_refused_before_anything_else() {
        let status = permit(&identity(None), "../pg-1", Rpc::Status).unwrap_err();
        assert_eq!(Code::of(&status), Code::Invalid);
    }

    fn entry(text: &str) -> Option<Role> {
        toml::from_str::<MapEntry>(&format!("common_name = \"x\"\n{text}")).unwrap().given()
    }

    #[test]
    fn an_entry_of_the_map_gives_one_thing_or_is_refused() {
        assert_eq!(entry("cluster = \"a\""), Some(Role::Tenant("a".parse().unwrap())));
        assert_eq!(entry("role = \"observer\""), Some(Role::Observer));
        assert_eq!(entry("role = \"operator\""), Some(Role::Operator));
        assert_eq!(entry("role = \"admin\""), Some(Role::Admin));
        assert_eq!(entry("admin = true"), Some(Role::Admin));
        for bad in [
            "",
            "role = \"tenant\"",
            "cluster = \"a\"\nrole = \"admin\"",
            "cluster = \"a\"\nadmin = true",
            "role = \"observer\"\nadmin = true",
        ] {
            assert_eq!(entry(bad), None, "{bad}");
        }
    }

    /// Regression test: the server started with such an entry, and refused every call of the certificate.
    #[test]
    fn an_entry_that_names_a_generation_is_refused_with_the_name_of_its_cluster() {
        for number in [1, 2] {
            let text = format!("[[map]]\ncommon_name = \"app\"\ncluster = \"main@{number}\"\n");
            let problems = toml::from_str::<AuthConfig>(&text).unwrap().validate();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains("cluster = \"main\""), "{problems:?}");
        }
        let text = "[[map]]\ncommon_name = \"app\"\ncluster = \"main\"\n";
        assert_eq!(toml::from_str::<AuthConfig>(text).unwrap().validate(), [""; 0]);
    }

    /// A server with the authority of `init` and the company's, and certificates of both.
    struct Two {
        own: pki::Pair,
        company: pki::Pair,
        _dir: tempfile::TempDir,
        tls: watch::Receiver<Arc<Loaded>>,
    }

    impl Two {
        fn new() -> Self {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let dir = tempfile::tempdir().unwrap();
            let own = pki::new_authority().unwrap();
            let company = pki::authority_named("The company").unwrap();
            let server = pki::issue_server(&own, &["localhost".into()]).unwrap();
            let path = |name: &str| dir.path().join(name);
            std::fs::write(path("cert"), server.cert).unwrap();
            std::fs::write(path("key"), server.key).unwrap();
            // The company's authority comes first, because the order must not matter.
            std::fs::write(path("ca"), format!("{}{}", company.cert, own.cert)).unwrap();
            let files = crate::access::tls::TlsFiles {
                cert: path("cert"),
                key: path("key"),
                client_ca: path("ca"),
            };
            let tls = watch::channel(Arc::new(files.load().unwrap())).1;
            Self { own, company, _dir: dir, tls }
        }

        fn role(&self, authority: &pki::Pair, subject: &pki::Subject, rules: &str) -> Option<Role> {
            let rules: AuthConfig = toml::from_str(rules).unwrap();
            let auth = Auth::new(Some(self.tls.clone()), watch::channel(Arc::new(rules)).1);
            let pair = pki::issue_client(authority, subject).unwrap();
            let der = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
            auth.identify_chain(Some(Arc::new(vec![der]))).ok()?.role
        }
    }

    /// Regression test: an organisational unit of any authority in client_ca made an administrator.
    #[test]
    fn a_unit_counts_only_for_the_servers_own_authority_or_where_units_are_trusted() {
        let two = Two::new();
        let roles = [Role::Observer, Role::Operator, Role::Admin];
        for role in roles {
            let subject = pki::Subject::Person("ops".into(), role.name());
            assert_eq!(two.role(&two.own, &subject, ""), Some(role.clone()));
            assert_eq!(two.role(&two.company, &subject, ""), None);
            assert_eq!(two.role(&two.company, &subject, "trust_units = true"), Some(role.clone()));
            let mapped = "map = [{ common_name = \"ops\", role = \"observer\" }]";
            assert_eq!(two.role(&two.own, &subject, mapped), Some(Role::Observer));
            assert_eq!(two.role(&two.company, &subject, mapped), Some(Role::Observer));
        }
        // With a unit that does not count, the certificate has the role of its name and no more.
        let subject = pki::Subject::Person("klio@a".into(), RoleName::Admin);
        let tenant = Some(Role::Tenant("a".parse().unwrap()));
        assert_eq!(two.role(&two.company, &subject, ""), tenant);
    }

    #[test]
    fn the_common_name_decides_the_tenant() {
        let two = Two::new();
        let role = |name: &str| two.role(&two.company, &pki::Subject::Client(name.into()), "");
        assert_eq!(role("app@pg-1"), Some(Role::Tenant("pg-1".parse().unwrap())));
        for refused in ["ops", "a@", "a@B", "a@b@c"] {
            assert_eq!(role(refused), None, "{refused:?}");
        }
    }
}
