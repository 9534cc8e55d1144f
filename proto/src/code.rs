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
    /// The server or the network is not available now.
    Unavailable { name: "UNAVAILABLE", grpc: Unavailable, retry: true, exit: 10, hint: "is klio-server running, and reachable at this address?" }
    /// The server's disk is full; nothing is acknowledged until space returns.
    DiskFull { name: "DISK_FULL", grpc: ResourceExhausted, retry: true, exit: 11, hint: "free space on the server's tier-1 disk; receiving goes on by itself" }
    /// A write or fsync failed on the server; it reopens and recovers the segment.
    StorageFailed { name: "STORAGE_FAILED", grpc: Unavailable, retry: true, exit: 12, hint: "look at the server's log and its disk" }
    /// Another writer is streaming this cluster.
    WriterConflict { name: "WRITER_CONFLICT", grpc: Aborted, retry: true, exit: 13, hint: "stop the other klio stream of this cluster, or wait until its connection is gone" }
    /// The server already holds a newer timeline of this cluster.
    StaleTimeline { name: "STALE_TIMELINE", grpc: FailedPrecondition, retry: false, exit: 14, hint: "either this PostgreSQL is an old primary: rebuild it as a standby of the new one; or the newer timeline is that of a copy that was promoted and streams by mistake: stop its klio stream, then klio timeline follow the timeline of this PostgreSQL" }
    /// The certificate does not allow this cluster or call.
    Forbidden { name: "FORBIDDEN", grpc: PermissionDenied, retry: false, exit: 15, hint: "use the client bundle that was issued for this cluster" }
    /// No usable client certificate.
    Unauthenticated { name: "UNAUTHENTICATED", grpc: Unauthenticated, retry: false, exit: 16, hint: "check the certificate's expiry and authority, or issue a new bundle with klio-server client" }
    /// Not the PostgreSQL that was pinned at first contact.
    WrongSystem { name: "WRONG_SYSTEM", grpc: FailedPrecondition, retry: false, exit: 17, hint: "after pg_upgrade or for a copy klio stream begins a generation of its own, which klio generation follow or retire decides; a PostgreSQL that does not belong here needs another cluster name" }
    /// WAL that does not continue where the last byte ended.
    BadPosition { name: "BAD_POSITION", grpc: OutOfRange, retry: true, exit: 18, hint: "reconnect: the server says where to go on" }
    /// WAL whose pages do not belong where they were sent.
    BadWal { name: "BAD_WAL", grpc: DataLoss, retry: false, exit: 19, hint: "check PostgreSQL's WAL with pg_waldump; nothing of the page was stored" }
    /// A request that cannot be right.
    Invalid { name: "INVALID", grpc: InvalidArgument, retry: false, exit: 20, hint: "if it was typed as meant, client and server may be of different versions" }
    /// Nothing of that name is held: definitive (P7).
    NotFound { name: "NOT_FOUND", grpc: NotFound, retry: false, exit: 1, hint: "klio list and klio list wal show what is held" }
    /// Stored bytes are damaged.
    Corrupt { name: "CORRUPT", grpc: DataLoss, retry: false, exit: 21, hint: "the file in the other tier may be good; keep both" }
    /// PostgreSQL no longer has WAL that the server does not hold either.
    Gap { name: "GAP", grpc: FailedPrecondition, retry: false, exit: 22, hint: "klio list shows what can still be recovered; from a new base backup on everything can again" }
    /// Another backup of this cluster is running.
    Busy { name: "BUSY", grpc: Aborted, retry: true, exit: 23, hint: "wait until the other backup has ended, or its connection is gone" }
    /// A backup that needs something which is not held; its record was not written.
    Incomplete { name: "INCOMPLETE", grpc: FailedPrecondition, retry: false, exit: 24, hint: "take the backup again; if it stays so, look at the server's log" }
    /// PostgreSQL's WAL is not the one that is held under the same numbers (P11).
    Diverged { name: "DIVERGED", grpc: FailedPrecondition, retry: false, exit: 25, hint: "klio generation list shows the histories; klio generation follow or retire decides, docs/runbooks/KlioHistoryDiverged.md" }
    /// More than this cluster may use of what all clusters share; WAL is received all the same.
    Quota { name: "QUOTA", grpc: ResourceExhausted, retry: true, exit: 28, hint: "let other work of this cluster end, or have the server's [quota] changed" }
    /// A person decided against this timeline of the cluster.
    RetiredTimeline { name: "RETIRED_TIMELINE", grpc: FailedPrecondition, retry: false, exit: 26, hint: "klio timeline list says who decided, and when; stop the klio stream of this PostgreSQL, or decide again with klio timeline follow" }
    /// Something that should not happen.
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

/// A status travels in HTTP/2 headers, whose size peers limit: a longer one arrives as no message at all.
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

    /// Found by a damaged repository, whose error is pages long.
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
