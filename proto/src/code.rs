//! The one table of error codes for both ends of klio.v1 and for the exit status of `klio`.
//!
//! A code travels in the metadata key `klio-code` beside the gRPC status, so that a peer of another
//! version still gets a usable gRPC code. Names and exit statuses never change once released;
//! docs/errors.md is generated from this table.

use tonic::{Status, metadata::MetadataValue};

/// Metadata key that carries [`Code::name`].
pub const CODE_KEY: &str = "klio-code";

macro_rules! codes {
    ($($(#[doc = $doc:literal])* $variant:ident { name: $name:literal, grpc: $grpc:ident, retry: $retry:literal, exit: $exit:literal, hint: $hint:literal })*) => {
        /// Why a call was refused or failed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[doc = $doc])* $variant,)* }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Code] = &[$(Code::$variant),*];
            /// The stable name, as on the wire.
            pub const fn name(self) -> &'static str { match self { $(Code::$variant => $name),* } }
            /// The gRPC status that goes with it.
            pub const fn grpc(self) -> tonic::Code { match self { $(Code::$variant => tonic::Code::$grpc),* } }
            /// Whether the same call can succeed later without anybody changing anything.
            pub const fn retryable(self) -> bool { match self { $(Code::$variant => $retry),* } }
            /// Exit status of a command that ends with it.
            pub const fn exit(self) -> u8 { match self { $(Code::$variant => $exit),* } }
            /// What the reader can do.
            pub const fn hint(self) -> &'static str { match self { $(Code::$variant => $hint),* } }
            /// What it means.
            pub const fn meaning(self) -> &'static str { match self { $(Code::$variant => concat!($($doc),*)),* } }
        }
    };
}

codes! {
    /// The server or the network is not available.
    Unavailable { name: "UNAVAILABLE", grpc: Unavailable, retry: true, exit: 10, hint: "is klio-server running, and reachable at this address?" }
    /// The server's disk is full; nothing is acknowledged until there is space again.
    DiskFull { name: "DISK_FULL", grpc: ResourceExhausted, retry: true, exit: 11, hint: "free space on the server's tier-1 disk; streaming continues by itself" }
    /// A write or fsync failed on the server; it reopens and recovers the segment.
    StorageFailed { name: "STORAGE_FAILED", grpc: Unavailable, retry: true, exit: 12, hint: "look at the server's log and its disk" }
    /// Another writer is streaming this cluster.
    WriterConflict { name: "WRITER_CONFLICT", grpc: Aborted, retry: true, exit: 13, hint: "stop the other klio stream of this cluster, or wait for its connection to close" }
    /// The server already holds a newer timeline of this cluster.
    StaleTimeline { name: "STALE_TIMELINE", grpc: FailedPrecondition, retry: false, exit: 14, hint: "either this PostgreSQL is an old primary: rebuild it as a standby of the new one; or the newer timeline is that of a copy that was promoted and streams by mistake: stop its klio stream, then klio timeline follow the timeline of this PostgreSQL" }
    /// The certificate does not allow this cluster or call.
    Forbidden { name: "FORBIDDEN", grpc: PermissionDenied, retry: false, exit: 15, hint: "use the client bundle that was issued for this cluster" }
    /// No usable client certificate.
    Unauthenticated { name: "UNAUTHENTICATED", grpc: Unauthenticated, retry: true, exit: 16, hint: "compare the clocks of both machines, check the certificate's expiry and authority, or issue a new bundle with klio-server client" }
    /// This PostgreSQL has another system identifier than the one that first used this cluster name.
    WrongSystem { name: "WRONG_SYSTEM", grpc: FailedPrecondition, retry: false, exit: 17, hint: "after pg_upgrade, or for a copy, klio stream begins a new generation: accept it with klio generation follow or refuse it with klio generation retire; a PostgreSQL that does not belong here needs another cluster name" }
    /// The WAL that was sent does not continue where the last byte ended.
    BadPosition { name: "BAD_POSITION", grpc: OutOfRange, retry: true, exit: 18, hint: "reconnect: the server says where to continue" }
    /// The WAL that was sent has pages that belong elsewhere.
    BadWal { name: "BAD_WAL", grpc: DataLoss, retry: false, exit: 19, hint: "check PostgreSQL's WAL with pg_waldump; no part of the page was stored" }
    /// The request is not valid.
    Invalid { name: "INVALID", grpc: InvalidArgument, retry: false, exit: 20, hint: "check the command; client and server may be of different versions" }
    /// No such object in either tier; retrying will not help.
    NotFound { name: "NOT_FOUND", grpc: NotFound, retry: false, exit: 1, hint: "klio list and klio list wal show what is stored" }
    /// Stored bytes are damaged.
    Corrupt { name: "CORRUPT", grpc: DataLoss, retry: false, exit: 21, hint: "keep both copies: the one in the other tier may be good" }
    /// WAL is missing: the server does not have it, and PostgreSQL has removed it.
    Gap { name: "GAP", grpc: FailedPrecondition, retry: false, exit: 22, hint: "take a new base backup to be protected again; klio list shows what can still be restored" }
    /// Another backup of this cluster is running.
    Busy { name: "BUSY", grpc: Aborted, retry: true, exit: 23, hint: "wait for the other backup to finish or its connection to close" }
    /// The backup needs something that the server does not have, so it was not committed.
    Incomplete { name: "INCOMPLETE", grpc: FailedPrecondition, retry: false, exit: 24, hint: "take the backup again; if that fails, too, look at the server's log" }
    /// PostgreSQL's WAL differs from the WAL that the server holds at the same positions.
    Diverged { name: "DIVERGED", grpc: FailedPrecondition, retry: false, exit: 25, hint: "klio generation list shows the histories; accept one with klio generation follow or refuse it with klio generation retire (docs/runbooks/KlioHistoryDiverged.md)" }
    /// The cluster has reached one of its quotas; WAL is still received.
    Quota { name: "QUOTA", grpc: ResourceExhausted, retry: true, exit: 28, hint: "wait for other work of this cluster to finish, or raise [quota] on the server" }
    /// This timeline was retired by an operator.
    RetiredTimeline { name: "RETIRED_TIMELINE", grpc: FailedPrecondition, retry: false, exit: 26, hint: "klio timeline list shows who retired the timeline and when; stop the klio stream of this PostgreSQL, or accept the timeline after all with klio timeline follow" }
    /// An internal error.
    Internal { name: "INTERNAL", grpc: Internal, retry: true, exit: 70, hint: "this is a bug: please report it with the server's log" }
}

impl Code {
    /// A gRPC status with this code, a message for the reader, and the hint.
    pub fn status(self, message: impl std::fmt::Display) -> Status {
        let mut status = Status::new(self.grpc(), short(message.to_string()));
        status.metadata_mut().insert(CODE_KEY, MetadataValue::from_static(self.name()));
        status
    }

    /// The code of a received status; falls back on the gRPC code where the peer sent no name.
    pub fn of(status: &Status) -> Code {
        let name = status.metadata().get(CODE_KEY).and_then(|v| v.to_str().ok());
        if let Some(code) = name.and_then(|n| Code::ALL.iter().find(|c| c.name() == n)) {
            return *code;
        }
        match status.code() {
            tonic::Code::NotFound | tonic::Code::Unimplemented => Code::Invalid,
            tonic::Code::PermissionDenied => Code::Forbidden,
            tonic::Code::Unauthenticated => Code::Unauthenticated,
            tonic::Code::InvalidArgument => Code::Invalid,
            tonic::Code::Internal => Code::Internal,
            _ => Code::Unavailable,
        }
    }
}

/// A status is sent in HTTP/2 headers, whose size peers limit: a longer message would not arrive at all.
const MESSAGE_BYTES_MAX: usize = 2048;

fn short(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        let end = (0..=MESSAGE_BYTES_MAX).rev().find(|at| message.is_char_boundary(*at));
        message.truncate(end.unwrap_or(0));
        message.push_str(" ...");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for code in Code::ALL {
            let status = code.status("text");
            assert_eq!(Code::of(&status), *code);
            assert_eq!(status.code(), code.grpc());
        }
    }

    /// P7: a proxy's bare NOT_FOUND must never look like "the archive has no such segment".
    #[test]
    fn a_bare_grpc_not_found_is_not_a_missing_segment() {
        assert_ne!(Code::of(&Status::not_found("no such route")), Code::NotFound);
    }

    /// Found with a damaged repository, whose error is pages long.
    #[test]
    fn a_message_that_is_too_long_for_headers_is_cut_not_lost() {
        let status = Code::Internal.status("ä".repeat(10_000));
        assert!((2000..2100).contains(&status.message().len()), "{}", status.message().len());
        assert!(status.message().ends_with(" ..."));
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<_> = Code::ALL.iter().map(|c| c.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Code::ALL.len());
    }
}
