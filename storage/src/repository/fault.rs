//! Turns rustic's errors into ours.
//!
//! If one of our own errors is at the bottom of the chain, its kind is preserved: a full disk stays `Full`. Errors
//! that rustic detects by itself mean damage: the repository does not contain what its own files say (`Corrupt`).

use crate::{Error, Kind, Op};
use rustic_core::RusticError;
use std::error::Error as StdError;

/// The error for an `op` on `place` that failed inside rustic.
pub(super) fn classify(op: Op, place: &str, error: Box<RusticError>) -> Error {
    if let Some(own) = own(error.as_ref()) {
        return own;
    }
    // rustic's text has line breaks and advice about its own programs; use one line of it.
    let text = error.display_log();
    let text = text.strip_prefix("Error: ").unwrap_or(&text).replace('\n', " ");
    Error::new(Kind::Corrupt, op, place, text).with_source(error)
}

/// Our error in the chain below `error`, copied.
fn own(error: &(dyn StdError + 'static)) -> Option<Error> {
    let mut cause = error.source();
    while let Some(current) = cause {
        if let Some(own) = current.downcast_ref::<Error>() {
            let copy = Error::new(own.kind, own.op, &own.place, &own.detail);
            return Some(match own.hint {
                Some(hint) => copy.hint(hint),
                None => copy,
            });
        }
        cause = current.source();
    }
    None
}
