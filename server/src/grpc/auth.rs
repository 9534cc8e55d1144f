//! P8: the client certificate names the cluster, and every call is checked against it.
//!
//! | subject | may |
//! |---|---|
//! | common name `NAME@CLUSTER` | everything on that cluster |
//! | organisational unit `klio-admin` | read everything, ask for verification and maintenance, write nothing |
//! | a `[[auth.map]]` entry for the common name | what the entry says: for foreign authorities |
//!
//! Anything else is refused. The chain is verified again on each call, against the authorities of now.

use crate::tls::Loaded;
use klio_proto::Code;
use klio_storage::layout::ClusterName;
use rustls::pki_types::CertificateDer;
use std::sync::Arc;
use tokio::sync::watch;
use tonic::{
    Extensions, Request, Status,
    transport::server::{TcpConnectInfo, TlsConnectInfo},
};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Organisational unit of an administrator's certificate.
pub const ADMIN_UNIT: &str = "klio-admin";

/// What a caller may touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// One cluster, all of it.
    Cluster(ClusterName),
    /// Reads everything.
    Admin,
}

/// Gives a certificate of a foreign authority a role.
#[derive(Debug, Clone, serde::Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct MapEntry {
    /// The subject's common name, compared exactly.
    pub common_name: String,
    /// The cluster it may use.
    pub cluster: Option<ClusterName>,
    /// Or: an administrator.
    #[serde(default)]
    pub admin: bool,
}

/// Whether a call changes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Looks only.
    Read,
    /// Adds WAL and backups.
    Write,
    /// Asks the server for work of its own that it decides on itself: verify, maintain, keep a result.
    Operate,
}

/// Who is calling.
#[derive(Clone)]
pub struct Identity {
    /// The certificate's common name, or `plaintext`.
    pub name: String,
    /// What it may touch; `None` with unsafe plaintext: everything.
    pub role: Option<Role>,
    /// End of the certificate, Unix seconds; 0 with plaintext.
    pub expires_unix: i64,
    chain: Option<Arc<Vec<CertificateDer<'static>>>>,
}

impl Identity {
    /// Whether the caller may see this cluster.
    pub fn sees(&self, cluster: &ClusterName) -> bool {
        match &self.role {
            None | Some(Role::Admin) => true,
            Some(Role::Cluster(own)) => own == cluster,
        }
    }
}

/// Checks callers.
#[derive(Clone)]
pub struct Auth {
    /// `None`: unsafe plaintext was asked for.
    tls: Option<watch::Receiver<Arc<Loaded>>>,
    map: Arc<[MapEntry]>,
}

impl Auth {
    /// With the certificates in use, or `None` for unsafe plaintext.
    pub fn new(tls: Option<watch::Receiver<Arc<Loaded>>>, map: Vec<MapEntry>) -> Self {
        Self { tls, map: map.into() }
    }

    /// Who is calling.
    pub fn identify<T>(&self, request: &Request<T>) -> Result<Identity, Status> {
        self.identify_by(request.extensions())
    }

    /// Who is calling, from a request's extensions.
    pub fn identify_by(&self, extensions: &Extensions) -> Result<Identity, Status> {
        if self.tls.is_none() {
            let name = "plaintext".to_owned();
            return Ok(Identity { name, role: None, expires_unix: 0, chain: None });
        }
        let chain = extensions
            .get::<TlsConnectInfo<TcpConnectInfo>>()
            .and_then(|info| info.peer_certs())
            .ok_or_else(|| {
                Code::Unauthenticated.status("expected a client certificate, found none")
            })?;
        let (name, unit, expires_unix) = subject(&chain[0])?;
        let role = self.role(&name, unit.as_deref())?;
        let identity = Identity { name, role: Some(role), expires_unix, chain: Some(chain) };
        self.recheck(&identity)?;
        Ok(identity)
    }

    /// Whether an identity is still good: not expired, authority not removed.
    pub fn recheck(&self, identity: &Identity) -> Result<(), Status> {
        let (Some(tls), Some(chain)) = (&self.tls, &identity.chain) else { return Ok(()) };
        tls.borrow().verify(chain).map_err(|error| {
            let name = &identity.name;
            Code::Unauthenticated.status(format!("verify client certificate {name:?}: {error}"))
        })
    }

    /// Resolves when the certificates in use change; never with plaintext. Cancel-safe.
    pub async fn changed(&mut self) {
        if let Some(tls) = &mut self.tls
            && tls.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// The caller and the cluster, when the one may use the other so.
    pub fn require<T>(
        &self,
        request: &Request<T>,
        cluster: &str,
        access: Access,
    ) -> Result<(Identity, ClusterName), Status> {
        let identity = self.identify(request)?;
        let cluster = permit(&identity, cluster, access)?;
        Ok((identity, cluster))
    }

    fn role(&self, name: &str, unit: Option<&str>) -> Result<Role, Status> {
        if let Some(entry) = self.map.iter().find(|e| e.common_name == name) {
            // An entry with neither is refused by the configuration's validation; here it means nobody.
            if let Some(cluster) = &entry.cluster {
                return Ok(Role::Cluster(cluster.clone()));
            }
            if entry.admin {
                return Ok(Role::Admin);
            }
            return Err(Code::Forbidden.status(format!("[[auth.map]] gives {name:?} nothing")));
        }
        if unit == Some(ADMIN_UNIT) {
            return Ok(Role::Admin);
        }
        name.split_once('@').and_then(|(_, cluster)| cluster.parse().ok()).map(Role::Cluster).ok_or_else(
            || {
                Code::Forbidden.status(format!(
                    "expected a client certificate with common name NAME@CLUSTER or an [[auth.map]] entry, found {name:?}"
                ))
            },
        )
    }
}

/// Whether this caller may use this cluster so.
pub fn permit(identity: &Identity, cluster: &str, access: Access) -> Result<ClusterName, Status> {
    let cluster: ClusterName =
        cluster.parse().map_err(|e| Code::Invalid.status(format!("read request: {e}")))?;
    let good = match &identity.role {
        None => true,
        Some(Role::Admin) => matches!(access, Access::Read | Access::Operate),
        Some(Role::Cluster(own)) => *own == cluster,
    };
    if good {
        return Ok(cluster);
    }
    let allowed = match &identity.role {
        Some(Role::Cluster(own)) => format!("cluster {own}"),
        _ => "reading only".to_owned(),
    };
    Err(Code::Forbidden.status(format!(
        "certificate {:?} allows {allowed}, the call names cluster {cluster}",
        identity.name
    )))
}

fn subject(der: &CertificateDer<'_>) -> Result<(String, Option<String>, i64), Status> {
    let refuse =
        |detail: String| Code::Unauthenticated.status(format!("read client certificate: {detail}"));
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| refuse(e.to_string()))?;
    let text = |mut values: Box<dyn Iterator<Item = Option<String>> + '_>| values.next().flatten();
    let subject = cert.subject();
    let name =
        text(Box::new(subject.iter_common_name().map(|a| a.as_str().ok().map(str::to_owned))));
    let unit = text(Box::new(
        subject.iter_organizational_unit().map(|a| a.as_str().ok().map(str::to_owned)),
    ));
    let name = name.ok_or_else(|| refuse("expected a common name, found none".into()))?;
    Ok((name, unit, cert.validity().not_after.timestamp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(role: Option<Role>) -> Identity {
        Identity { name: "x".into(), role, expires_unix: 0, chain: None }
    }

    /// Klio (Go): any client with a valid certificate read and wrote any cluster (field.md section 2).
    #[test]
    fn one_clusters_certificate_cannot_touch_another() {
        let own = identity(Some(Role::Cluster("pg-1".parse().unwrap())));
        assert!(permit(&own, "pg-1", Access::Write).is_ok());
        for access in [Access::Read, Access::Write, Access::Operate] {
            let status = permit(&own, "pg-2", access).unwrap_err();
            assert_eq!(Code::of(&status), Code::Forbidden);
            assert!(status.message().contains("pg-1") && status.message().contains("pg-2"));
        }
    }

    #[test]
    fn an_administrator_reads_everything_and_writes_nothing() {
        let admin = identity(Some(Role::Admin));
        assert!(permit(&admin, "pg-1", Access::Read).is_ok());
        assert!(permit(&admin, "pg-1", Access::Operate).is_ok());
        assert!(permit(&admin, "pg-1", Access::Write).is_err());
    }

    #[test]
    fn a_name_with_dots_is_refused_before_anything_else() {
        let status = permit(&identity(None), "../pg-1", Access::Read).unwrap_err();
        assert_eq!(Code::of(&status), Code::Invalid);
    }

    #[test]
    fn the_subject_decides_the_role() {
        let map = vec![MapEntry {
            common_name: "db1.example.com".into(),
            cluster: "pg-9".parse().ok(),
            admin: false,
        }];
        let auth = Auth::new(None, map);
        assert_eq!(auth.role("app@pg-1", None).unwrap(), Role::Cluster("pg-1".parse().unwrap()));
        assert_eq!(
            auth.role("db1.example.com", None).unwrap(),
            Role::Cluster("pg-9".parse().unwrap())
        );
        assert_eq!(auth.role("ops", Some(ADMIN_UNIT)).unwrap(), Role::Admin);
        for refused in ["ops", "a@", "a@B", "a@b@c", ""] {
            assert!(auth.role(refused, None).is_err(), "{refused:?}");
        }
    }
}
