//! Which role may make which call: one table of every RPC of klio.v1, from which permissions are decided (P8, P13).
//!
//! - An RPC without a row cannot be called by anybody, because a handler asks with its [`Rpc`]. A test walks the
//!   compiled descriptors and fails for an RPC without a row, and docs/access.md shows the same table.
//! - Only the tenant can open a repository. An administrator does not need to: a restore uses a client bundle of the
//!   cluster, which `klio-server client` issues.

use klio_storage::layout::ClusterName;

/// The kinds of callers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum RoleName {
    /// The sidecar of one cluster: may add to that cluster, read it and restore it.
    Tenant,
    /// Sees the status of every cluster, but no data and no secrets, and changes nothing.
    Observer,
    /// An observer that may also request verification and maintenance, and make decisions about a cluster.
    Operator,
    /// An operator that may also read WAL and repository files of every cluster, but writes none.
    Admin,
}

impl RoleName {
    /// All roles, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Tenant, Self::Observer, Self::Operator, Self::Admin];

    /// The name in configuration, on the command line and in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Observer => "observer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// The organisational unit of a certificate with this role; `None` for a tenant, which is recognised by its common
    /// name.
    pub const fn unit(self) -> Option<&'static str> {
        match self {
            Self::Tenant => None,
            Self::Observer => Some("klio-observer"),
            Self::Operator => Some("klio-operator"),
            Self::Admin => Some("klio-admin"),
        }
    }

    /// The role that an organisational unit gives.
    pub fn of_unit(unit: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.unit() == Some(unit))
    }
}

/// The role of a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The tenant of this cluster.
    Tenant(ClusterName),
    /// For every cluster.
    Observer,
    /// For every cluster.
    Operator,
    /// For every cluster.
    Admin,
}

impl Role {
    pub const fn name(&self) -> RoleName {
        match self {
            Self::Tenant(_) => RoleName::Tenant,
            Self::Observer => RoleName::Observer,
            Self::Operator => RoleName::Operator,
            Self::Admin => RoleName::Admin,
        }
    }

    /// Whether it may make this call for this cluster.
    pub fn may(&self, rpc: Rpc, cluster: &ClusterName) -> bool {
        rpc.roles().contains(&self.name()) && self.sees(cluster)
    }

    /// Whether the role covers this cluster.
    pub fn sees(&self, cluster: &ClusterName) -> bool {
        match self {
            Self::Tenant(own) => *own == cluster.base(),
            Self::Observer | Self::Operator | Self::Admin => true,
        }
    }
}

macro_rules! table {
    ($($rpc:ident $method:literal: $($role:ident)*;)*) => {
        /// Every call of klio.v1.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Rpc { $(#[doc = $method] $rpc,)* }

        impl Rpc {
            /// Every row.
            pub const ALL: &'static [Self] = &[$(Self::$rpc),*];

            /// `package.Service/Method`.
            pub const fn method(self) -> &'static str { match self { $(Self::$rpc => $method),* } }

            /// The roles that may make the call.
            pub const fn roles(self) -> &'static [RoleName] {
                match self { $(Self::$rpc => &[$(RoleName::$role),*],)* }
            }
        }
    };
}

table! {
    Position       "klio.v1.Wal/Position":        Tenant;
    PutHistory     "klio.v1.Wal/PutHistory":      Tenant;
    Compare        "klio.v1.Wal/Compare":         Tenant;
    BeginGeneration "klio.v1.Wal/BeginGeneration": Tenant;
    Refill         "klio.v1.Wal/Refill":          Tenant;
    Receive        "klio.v1.Wal/Receive":         Tenant;
    Fetch          "klio.v1.Wal/Fetch":           Tenant Admin;
    OpenRepository "klio.v1.Base/OpenRepository": Tenant;
    PutFile        "klio.v1.Base/PutFile":        Tenant;
    GetFile        "klio.v1.Base/GetFile":        Tenant Admin;
    ListFiles      "klio.v1.Base/ListFiles":      Tenant Admin;
    Reserve        "klio.v1.Base/Reserve":        Tenant;
    CommitBackup   "klio.v1.Base/CommitBackup":   Tenant;
    ListBackups    "klio.v1.Base/ListBackups":    Tenant Observer Operator Admin;
    Holdings       "klio.v1.Base/Holdings":       Tenant Observer Operator Admin;
    Verify         "klio.v1.Base/Verify":         Tenant Operator Admin;
    Maintain       "klio.v1.Base/Maintain":       Tenant Operator Admin;
    PlanRetention  "klio.v1.Base/PlanRetention":  Tenant Observer Operator Admin;
    RecordDrill    "klio.v1.Base/RecordDrill":    Tenant Operator Admin;
    ListGenerations "klio.v1.Catalog/ListGenerations": Tenant Observer Operator Admin;
    DecideGeneration "klio.v1.Catalog/DecideGeneration": Operator Admin;
    Status         "klio.v1.Catalog/Status":      Tenant Observer Operator Admin;
    ListWal        "klio.v1.Catalog/ListWal":     Tenant Observer Operator Admin;
    Check          "klio.v1.Catalog/Check":       Tenant Observer Operator Admin;
    Timelines      "klio.v1.Catalog/Timelines":   Tenant Observer Operator Admin;
    DecideTimeline "klio.v1.Catalog/DecideTimeline": Operator Admin;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn main() -> ClusterName {
        "main".parse().unwrap()
    }

    /// P8: a certificate of one cluster does nothing on another, whatever the call.
    #[test]
    fn a_tenant_may_do_nothing_on_another_cluster() {
        let other = Role::Tenant("other".parse().unwrap());
        assert!(Rpc::ALL.iter().all(|rpc| !other.may(*rpc, &main())));
    }

    /// P13: only the tenant may open a repository or write.
    #[test]
    fn what_opens_a_repository_and_what_writes_is_the_tenants_alone() {
        let own = [
            Rpc::OpenRepository,
            Rpc::Position,
            Rpc::PutHistory,
            Rpc::Receive,
            Rpc::Refill,
            Rpc::PutFile,
            Rpc::Reserve,
            Rpc::CommitBackup,
        ];
        assert!(own.iter().all(|rpc| rpc.roles() == [RoleName::Tenant]));
    }

    #[test]
    fn each_role_but_the_tenant_may_what_the_one_before_it_may() {
        for rpc in Rpc::ALL {
            let may = |role| rpc.roles().contains(&role);
            assert!(!may(RoleName::Observer) || may(RoleName::Operator), "{rpc:?}");
            assert!(!may(RoleName::Operator) || may(RoleName::Admin), "{rpc:?}");
        }
    }

    #[test]
    fn the_documentation_shows_the_same_table() {
        let page = include_str!("../../../docs/access.md");
        for rpc in Rpc::ALL {
            let cell = |role| if rpc.roles().contains(&role) { "yes" } else { "-" };
            let cells = RoleName::ALL.map(cell).join(" | ");
            let row = format!("| `{}` | {cells} |", rpc.method().trim_start_matches("klio.v1."));
            assert!(page.lines().any(|line| line == row), "docs/access.md has no row {row}");
        }
    }
}
