//! A connection string for another program, such as PostgreSQL's `primary_conninfo`, stored as it was typed.
//!
//! Its syntax and keywords are checked as libpq would check them, so that a mistake is found here, and not by a
//! standby that repeats it in its log for ever. Whether Klio itself supports the keywords does not matter. Neither
//! `Debug` nor `Display` shows a secret.

use super::{ConnInfoError, keyword, text};
use std::fmt;

/// Keywords whose values are secret.
const SECRETS: [&str; 5] =
    ["password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"];

/// A checked connection string.
#[derive(Clone, PartialEq, Eq)]
pub struct Written {
    text: String,
    pairs: text::Pairs,
}

impl Written {
    /// Checks the string.
    ///
    /// # Errors
    /// Bad syntax, a keyword that libpq does not know, an empty string, or a control character such as a line break,
    /// which a configuration file cannot contain.
    pub fn parse(text: &str) -> Result<Self, ConnInfoError> {
        let syntax = |at, problem: &str| ConnInfoError::Syntax { at, problem: problem.to_owned() };
        if let Some(at) = text.chars().position(char::is_control) {
            return Err(syntax(at, "expected no control character"));
        }
        let pairs = text::tokenise(text)?;
        if pairs.is_empty() {
            return Err(syntax(
                0,
                "expected keyword=value or a postgresql:// address, found nothing",
            ));
        }
        match pairs.iter().find(|(name, _)| keyword::find(name).is_none()) {
            Some((name, _)) => Err(ConnInfoError::UnknownKeyword(name.clone())),
            None => Ok(Self { text: text.to_owned(), pairs }),
        }
    }

    /// The string as it was typed, with its secrets: for the file that PostgreSQL reads.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// The value of a keyword; `None` if it is missing or empty.
    pub fn value(&self, name: &str) -> Option<&str> {
        let found = self.pairs.iter().rfind(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// Whether it contains a secret.
    pub fn has_secret(&self) -> bool {
        SECRETS.iter().any(|name| self.value(name).is_some())
    }
}

/// Shown in keyword form, with `***` for secrets.
impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (name, value)) in self.pairs.iter().enumerate() {
            let value = match SECRETS.contains(&name.as_str()) {
                true => "***".to_owned(),
                false => super::show::quote(value),
            };
            write!(f, "{}{name}={value}", if number == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_as_typed_and_shown_without_secrets() {
        let written = Written::parse("host=db  user=r password='it s' sslmode=require").unwrap();
        assert_eq!(written.reveal(), "host=db  user=r password='it s' sslmode=require");
        let shown = "host=db user=r password=*** sslmode=require";
        assert_eq!((written.to_string().as_str(), format!("{written:?}").as_str()), (shown, shown));
        assert!(written.has_secret());
        let uri =
            Written::parse("postgresql://r:s3cret@[::1]:5433/?application_name=a%20b").unwrap();
        assert_eq!(
            uri.to_string(),
            "user=r password=*** host=::1 port=5433 application_name='a b'"
        );
    }

    #[test]
    fn what_libpq_would_refuse_is_refused_and_what_only_klio_would_is_not() {
        for bad in ["", "  ", "host", "host=db pasword=x", "host='db", "host=db\nuser=r"] {
            let error = Written::parse(bad).unwrap_err().to_string();
            assert!(!error.contains("=x"), "{error}");
        }
        for good in ["host=db gssencmode=require", "host=a,b port=1,2 requirepeer=postgres"] {
            assert!(Written::parse(good).is_ok(), "{good}");
        }
    }
}
