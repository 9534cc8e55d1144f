//! Takes secrets out of text before it is logged or becomes a span attribute.
//!
//! Removes: the password (or lone token) in a URL, `password=`-like settings in DSNs, query strings and
//! flags, credentials after Bearer and Basic, and AWS-style signatures. Errs on the side of removing.
//! Everything else stays byte for byte the same.

use regex::{Captures, Regex};
use std::{borrow::Cow, sync::LazyLock};

const MASK: &str = "***";

const SECRET_NAME: &str = r"(?:[a-z0-9_.\-]*(?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key|credential|signature|authorization)[a-z0-9_\-]*|pwd|sig|auth)";

#[expect(clippy::expect_used, reason = "the patterns are constants; the tests compile every one")]
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern is valid")
}

/// `scheme://user:password@host` or `scheme://token@host`; up to the last `@` before the path.
static URL: LazyLock<Regex> =
    LazyLock::new(|| pattern(r#"(?i)\b([a-z][a-z0-9+.\-]*://)([^\s/?#"'<>]*)@"#));

/// `Bearer xyz`, `Basic xyz`.
static SCHEME: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"(?i)\b(bearer|basic)(\s+|%20)[A-Za-z0-9._~+/=\-]{4,}"));

/// `name = value`, `name: value`, `"name":"value"`, quoted values with spaces and escapes.
static SETTING: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r#"(?i)(\b|--?|["']){SECRET_NAME}(["']?\s*[=:]\s*)('(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.)*"|[^\s&;,"']+)"#
    ))
});

static FLAG: LazyLock<Regex> = LazyLock::new(|| pattern(&format!("(?i)^--?{SECRET_NAME}$")));

/// The text with every secret replaced by `***`.
pub fn redact(text: &str) -> Cow<'_, str> {
    let step = URL.replace_all(text, |c: &Captures<'_>| {
        // The user name is no secret when a password follows; alone it may be a token.
        match c[2].split_once(':') {
            Some((user, _)) => format!("{}{user}:{MASK}@", &c[1]),
            None => format!("{}{MASK}@", &c[1]),
        }
    });
    let step = replace(step, &SCHEME, |c| format!("{}{}{MASK}", &c[1], &c[2]));
    replace(step, &SETTING, |c| {
        let (whole, value) = (&c[0], &c[3]);
        // The quotes stay, so that JSON and DSNs stay what they are.
        let quote = if value.starts_with(['\'', '"']) { &value[..1] } else { "" };
        format!("{}{quote}{MASK}{quote}", &whole[..whole.len() - value.len()])
    })
}

fn replace<'a>(
    text: Cow<'a, str>,
    pattern: &Regex,
    with: impl Fn(&Captures<'_>) -> String,
) -> Cow<'a, str> {
    match pattern.replace_all(&text, with) {
        Cow::Borrowed(_) => text,
        Cow::Owned(changed) => Cow::Owned(changed),
    }
}

/// A command line with its secrets removed, also when a flag and its value are separate words.
pub fn redact_arguments<S: AsRef<str>>(arguments: impl IntoIterator<Item = S>) -> Vec<String> {
    let mut after_secret_flag = false;
    let mut shown = Vec::new();
    for argument in arguments {
        let argument = argument.as_ref();
        shown.push(if after_secret_flag { MASK.to_owned() } else { redact(argument).into_owned() });
        after_secret_flag = !after_secret_flag && FLAG.is_match(argument);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_go_and_the_rest_stays() {
        let table = [
            ("plain text: a=b at 12:30", "plain text: a=b at 12:30"),
            ("postgres://klio:s3cr3t@db/x", "postgres://klio:***@db/x"),
            ("http://tok3n@collector:4318/v1", "http://***@collector:4318/v1"),
            ("postgres://u:p@ss@db/x", "postgres://u:***@db/x"),
            ("https://host/path@2", "https://host/path@2"),
            ("host=db password=hunter2 user=a", "host=db password=*** user=a"),
            (r"host=db password='it''s \' me' user=a", "host=db password='***' user=a"),
            ("sslpassword=x&y=1", "sslpassword=***&y=1"),
            ("authorization: Bearer abcdef.ghi", "authorization: *** ***"),
            ("sent Bearer abcdef.ghi away", "sent Bearer *** away"),
            ("https://b/k?X-Amz-Signature=ff00&x=1", "https://b/k?X-Amz-Signature=***&x=1"),
            (r#"{"secret_access_key":"abc def"}"#, r#"{"secret_access_key":"***"}"#),
            ("--api-key=xyz", "--api-key=***"),
            ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY=***"),
            ("PGPASSWORD=abc", "PGPASSWORD=***"),
        ];
        for (input, expected) in table {
            assert_eq!(redact(input), expected, "{input}");
            assert_eq!(redact(&redact(input)), expected, "twice: {input}");
        }
    }

    #[test]
    fn the_word_after_a_secret_flag_goes() {
        let shown =
            redact_arguments(["klio", "--token", "abc", "--name", "x", "--dsn", "password=y"]);
        assert_eq!(shown, ["klio", "--token", "***", "--name", "x", "--dsn", "password=***"]);
    }
}
