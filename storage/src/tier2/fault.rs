//! Classifies the failures of an object store for callers.
//!
//! P7: a 404 alone never becomes `Kind::NotFound`. That is decided in fetch.rs, after the store has shown
//! that the bucket exists. Here a 404 means that the bucket, or the path to it, does not exist.

use crate::{Error, Kind, Op};
use object_store::client::{HttpError, HttpErrorKind};
use std::{error::Error as StdError, io, path::Path};

const NO_BUCKET: &str =
    "check that the bucket exists and that tier2.url and tier2.endpoint are right";
const DENIED: &str = "check the credentials and that they may read, write and list the bucket";
const CONNECT: &str = "check that tier2.endpoint is right and reachable; a private certificate authority needs tier2.ca_file";

const CLOCK: &str = "set the clock (NTP) of the machine that runs klio-server, or klio if it reads the bucket itself (--from): the store refuses requests with a wrong time";
const EXPIRED: &str =
    "provide a new session token (it expired), or use ambient credentials, which are renewed";
const QUOTA: &str = "raise the bucket's quota (it is used up), or keep fewer backups";
const CHECKSUMS: &str = "set tier2.checksum = \"none\": this store does not accept S3's checksum header; uploads are then verified by reading them again";

/// Error codes in the body of an answer, for cases where the HTTP status says too little or is misleading.
const CODES: [(&str, Kind, &str); 6] = [
    ("RequestTimeTooSkewed", Kind::Transient, CLOCK),
    ("RequestExpired", Kind::Transient, CLOCK),
    ("ExpiredToken", Kind::Denied, EXPIRED),
    ("TokenRefreshRequired", Kind::Denied, EXPIRED),
    ("QuotaExceeded", Kind::Full, QUOTA),
    ("NoSuchBucket", Kind::Invalid, NO_BUCKET),
];

/// Converts a failure of the store to an error of ours.
pub(super) fn classify(op: Op, place: &str, error: object_store::Error) -> Error {
    let (kind, hint) = kind_of(&error);
    let built = Error::new(kind, op, place, chain(&error)).with_source(error);
    match hint {
        Some(hint) => built.hint(hint),
        None => built,
    }
}

/// Whether the store refused a request because of its checksum header.
pub(super) fn refuses_checksums(error: &object_store::Error) -> bool {
    let text = chain(error).to_lowercase();
    let refused = matches!(status(&text), Some(400 | 501)) || text.contains("notimplemented");
    refused && text.contains("checksum") && !text.contains("badd") && !text.contains("mismatch")
}

/// Whether the same request may succeed later.
pub(super) fn passes(error: &object_store::Error) -> bool {
    kind_of(error).0 == Kind::Transient
}

/// Whether a request ended because it made no progress (link.rs).
pub(super) fn stood_still(error: &object_store::Error) -> bool {
    http_kind(error) == Some(HttpErrorKind::Timeout)
}

fn http_kind(error: &object_store::Error) -> Option<HttpErrorKind> {
    let mut cause: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(current) = cause {
        if let Some(http) = current.downcast_ref::<HttpError>() {
            return Some(http.kind());
        }
        cause = current.source();
    }
    None
}

fn kind_of(error: &object_store::Error) -> (Kind, Option<&'static str>) {
    use object_store::Error as E;
    if refuses_checksums(error) {
        return (Kind::Invalid, Some(CHECKSUMS));
    }
    let text = chain(error);
    let said = CODES.iter().find(|(code, ..)| text.contains(&format!("<Code>{code}</Code>")));
    if let Some((_, kind, hint)) = said {
        return (*kind, Some(*hint));
    }
    match error {
        E::NotFound { .. } => (Kind::Invalid, Some(NO_BUCKET)),
        E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. } => {
            (Kind::Conflict, None)
        }
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => (Kind::Denied, Some(DENIED)),
        E::InvalidPath { .. } | E::NotSupported { .. } | E::UnknownConfigurationKey { .. } => {
            (Kind::Invalid, None)
        }
        E::NotImplemented { .. } => (Kind::Invalid, None),
        _ => by_cause(error),
    }
}

fn by_cause(error: &object_store::Error) -> (Kind, Option<&'static str>) {
    let mut cause: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(current) = cause {
        if let Some(http) = current.downcast_ref::<HttpError>() {
            let connect = http.kind() == HttpErrorKind::Connect;
            return (Kind::Transient, connect.then_some(CONNECT));
        }
        if let Some(local) = current.downcast_ref::<io::Error>() {
            return (kind_of_io(local), None);
        }
        cause = current.source();
    }
    match status(&error.to_string()) {
        Some(507) => (Kind::Full, None),
        Some(401 | 403) => (Kind::Denied, Some(DENIED)),
        Some(301 | 307 | 308) => (Kind::Invalid, Some("check tier2.region")),
        Some(408 | 425 | 429 | 500..) | None => (Kind::Transient, None),
        Some(_) => (Kind::Invalid, None),
    }
}

/// As `Error::io` decides, except that a missing directory is not a missing object (P7).
fn kind_of_io(error: &io::Error) -> Kind {
    match Error::io(Op::Read, Path::new(""), error.kind().into()).kind {
        Kind::NotFound => Kind::Invalid,
        kind => kind,
    }
}

/// The HTTP status in the text of object_store's retry error, whose type is not public. A test with a real
/// answer makes sure that this keeps working.
pub(super) fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// The message with every cause that adds something, on one line of limited length.
fn chain(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(current) = cause {
        let more = current.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = current.source();
    }
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(800).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(source: impl Into<Box<dyn StdError + Send + Sync>>) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: source.into() }
    }

    #[test]
    fn a_missing_bucket_is_not_a_missing_object() {
        let error = object_store::Error::NotFound { path: "x".into(), source: "404".into() };
        assert_ne!(classify(Op::Download, "x", error).kind, Kind::NotFound);
    }

    #[test]
    fn a_full_local_disk_is_full() {
        let error = generic(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(classify(Op::Upload, "x", error).kind, Kind::Full);
    }

    /// Before, a wrong clock was reported as "check the credentials", and a refused header as "the store
    /// said it exists".
    #[test]
    fn the_stores_own_code_decides_where_the_status_says_something_else() {
        let denied = |code: &str| object_store::Error::PermissionDenied {
            path: "x".into(),
            source: format!("status code: 403 Forbidden: <Error><Code>{code}</Code></Error>")
                .into(),
        };
        let classified = |error| {
            let error = classify(Op::Upload, "x", error);
            (error.kind, error.hint.unwrap_or_default())
        };
        let (kind, hint) = classified(denied("RequestTimeTooSkewed"));
        assert!(kind == Kind::Transient && hint.contains("clock"), "{kind:?} {hint}");
        // A sidecar shows its server's message, so the message must say whose clock is wrong.
        assert!(hint.contains("klio-server") && !hint.contains("this machine"), "{hint}");
        assert_eq!(classified(denied("QuotaExceeded")), (Kind::Full, QUOTA));
        assert_eq!(classified(denied("ExpiredToken")), (Kind::Denied, EXPIRED));
        assert_eq!(classified(denied("AccessDenied")), (Kind::Denied, DENIED));
        for answer in [
            "status code: 501 Not Implemented: <Error><Code>NotImplemented</Code><Message>Header 'x-amz-checksum-sha256' not implemented</Message></Error>",
            "status code: 400 Bad Request: <Error><Code>InvalidRequest</Code><Message>Unsupported header 'x-amz-sdk-checksum-algorithm'</Message></Error>",
        ] {
            assert_eq!(classified(generic(answer)), (Kind::Invalid, CHECKSUMS));
        }
        let damaged = "status code: 400 Bad Request: <Error><Code>BadDigest</Code><Message>The checksum did not match</Message></Error>";
        assert_ne!(classified(generic(damaged)).1, CHECKSUMS);
    }

    #[test]
    fn throttling_passes_and_a_bad_request_does_not() {
        let answer = |code| generic(format!("Server returned non-2xx status code: {code} X: <a/>"));
        for (code, kind) in [
            (429, Kind::Transient),
            (503, Kind::Transient),
            (507, Kind::Full),
            (400, Kind::Invalid),
        ] {
            assert_eq!(classify(Op::Upload, "x", answer(code)).kind, kind, "{code}");
        }
    }
}
