//! `require_auth`: which authentication methods are accepted, as defined by libpq
//! (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-REQUIRE-AUTH>).
//!
//! Without it, all methods are accepted. If the server asks for a method that is not accepted, nothing secret has been sent to
//! it.

/// Authentication methods, by libpq's names.
const METHODS: [&str; 7] = ["password", "md5", "gss", "sspi", "scram-sha-256", "oauth", "none"];

/// The methods that the server may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequireAuth {
    /// The list as it was given; if empty, everything is accepted.
    text: String,
    allowed: Vec<&'static str>,
}

impl RequireAuth {
    /// Reads a list such as `scram-sha-256` or `!password,!md5`; `None` if libpq would refuse it.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split(',').map(str::trim).collect();
        let negated = words.iter().filter(|word| word.starts_with('!')).count();
        if negated != 0 && negated != words.len() {
            return None;
        }
        let mut named = Vec::new();
        for word in &words {
            let word = word.trim_start_matches('!');
            let known = METHODS.iter().find(|method| **method == word)?;
            if named.contains(known) {
                return None;
            }
            named.push(*known);
        }
        let allowed = METHODS.into_iter().filter(|m| named.contains(m) == (negated == 0)).collect();
        Some(Self { text: text.to_owned(), allowed })
    }

    /// What the list may contain, for an error message.
    pub(super) fn expected() -> String {
        format!(
            "a list of {}, each at most once, all or none with a ! before it",
            METHODS.join(", ")
        )
    }

    /// Checks the server's request with this number (`AuthenticationXXX` of the protocol); the error says why it is
    /// not accepted.
    pub fn allows(&self, code: u32) -> Result<(), String> {
        let found = match code {
            0 => "none",
            3 => "password",
            5 => "md5",
            7 | 8 => "gss",
            9 => "sspi",
            10 => "scram-sha-256",
            _ => return Ok(()),
        };
        if self.text.is_empty() || self.allowed.contains(&found) {
            return Ok(());
        }
        Err(format!("require_auth={}: the server asks for {found}", self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_allows_what_it_names_and_a_negated_one_everything_else() {
        let allows = |text: &str, code| RequireAuth::parse(text).unwrap().allows(code).is_ok();
        let ways = |text: &str| [0, 3, 5, 10].map(|code| allows(text, code));
        assert_eq!(ways("scram-sha-256"), [false, false, false, true]);
        assert_eq!(ways("md5, scram-sha-256"), [false, false, true, true]);
        assert_eq!(ways("!password,!none"), [false, false, true, true]);
        assert_eq!(ways("none"), [true, false, false, false]);
        assert!((0..13).all(|code| RequireAuth::default().allows(code).is_ok()));
        for bad in ["", "scram", "md5,!none", "md5,md5", "!"] {
            assert_eq!(RequireAuth::parse(bad), None, "{bad:?}");
        }
    }
}
