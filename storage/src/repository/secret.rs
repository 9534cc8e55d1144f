//! `<cluster>/repository.json[.age]`: the secret of a cluster's repository, as stored in both tiers.
//!
//! In the format of `crate::record`; with encryption at rest, all of it is one age file. By hand (P10):
//! `age -d -i identity repository.json.age | jq -r .body.password` prints the password for stock restic.

use super::Secret;
use crate::{Error, crypt::AtRest, layout::BaseObject, record};
use std::fmt;
use zeroize::Zeroizing;

/// Far more than any secret takes.
pub const SECRET_LIMIT_BYTES: u64 = 1 << 20;

/// Both objects that a secret may be stored as; the one for new secrets comes first.
pub const fn secret_objects(at_rest: &AtRest) -> [BaseObject; 2] {
    let on = at_rest.is_on();
    [BaseObject::Secret { encrypted: on }, BaseObject::Secret { encrypted: !on }]
}

/// The object and the bytes to store a secret as.
///
/// # Errors
/// `Invalid` when it cannot be encrypted.
pub fn encode_secret(
    secret: &Secret,
    at_rest: &AtRest,
    place: impl fmt::Display,
) -> Result<(BaseObject, Vec<u8>), Error> {
    let plain = record::encode(secret, place)?;
    Ok(match at_rest.writing() {
        Some(keys) => {
            let plain = Zeroizing::new(plain);
            (BaseObject::Secret { encrypted: true }, keys.wrap(&plain)?)
        }
        None => (BaseObject::Secret { encrypted: false }, plain),
    })
}

/// Parses a stored secret.
///
/// # Errors
/// `Denied` without the right key; `Corrupt`.
pub fn decode_secret(
    bytes: &[u8],
    encrypted: bool,
    at_rest: &AtRest,
    place: impl fmt::Display,
) -> Result<Secret, Error> {
    if encrypted {
        let plain = at_rest.need(&place)?.unwrap(bytes)?;
        return record::decode(&plain, place);
    }
    record::decode(bytes, place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, crypt::Keys};

    fn keys() -> Keys {
        let (identity, _) = Keys::generate();
        Keys::from_text(&identity, &[]).unwrap()
    }

    #[test]
    fn a_secret_round_trips_in_both_forms() {
        let secret = Secret::generate();
        for at_rest in [AtRest::Off, AtRest::On(keys())] {
            let (object, bytes) = encode_secret(&secret, &at_rest, "x").unwrap();
            assert_eq!(object, secret_objects(&at_rest)[0]);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert_eq!(text.contains(secret.password.as_str()), !at_rest.is_on());
            let back = decode_secret(&bytes, at_rest.is_on(), &at_rest, "x").unwrap();
            assert_eq!(back.password, secret.password);
            assert_eq!(back.master_key, secret.master_key);
        }
    }

    #[test]
    fn another_key_and_none_are_refused() {
        let (_, bytes) = encode_secret(&Secret::generate(), &AtRest::On(keys()), "x").unwrap();
        for at_rest in [AtRest::Off, AtRest::On(keys())] {
            assert_eq!(decode_secret(&bytes, true, &at_rest, "x").unwrap_err().kind, Kind::Denied);
        }
    }
}
