//! `require_auth`: which ways of logging in are acceptable, as libpq means it
//! (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-REQUIRE-AUTH>).
//!
//! Without it every way is. A server that asks for another way has learnt nothing from us.

/// A way of logging in, by libpq's word.
const METHODS: [&str; 7] = ["password", "md5", "gss", "sspi", "scram-sha-256", "oauth", "none"];

/// What the server may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RequireAuth {
    /// As it was given; empty: everything.
    text: String,
    allowed: Vec<&'static str>,
}

impl RequireAuth {
    /// Reads a list such as `scram-sha-256` or `!password,!md5`. `None` for what libpq would refuse.
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

    /// What the list may hold, for an error.
    pub(super) fn expected() -> String {
        format!(
            "a list of {}, each at most once, all or none with a ! before it",
            METHODS.join(", ")
        )
    }

    /// Whether the server's request of this number (`AuthenticationXXX` of the protocol) is acceptable; what is in the way
    /// otherwise.
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
