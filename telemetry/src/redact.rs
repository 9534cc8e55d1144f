//! Removes secrets from text before it is logged or becomes a span attribute.
//!
//! Removes: the password (or single token) in a URL; settings like `password=` in DSNs, query strings, headers, JSON
//! and flags; credentials after Bearer and Basic; signatures of presigned URLs; private keys. In doubt it removes.
//! Everything else stays byte for byte the same, and redacting twice has the same result as redacting once.

use regex::{Captures, Regex};
use std::{borrow::Cow, sync::LazyLock};

const MASK: &str = "***";

/// The names of settings, parameters, headers and flags with secrets.
const SECRET_NAME: &str = r"(?:[a-z0-9_.\-]*(?:password|passwd|passphrase|passcode|secret|token|api[_-]?key|access[_-]?key|account[_-]?key|private[_-]?key|shared[_-]?key|credential|signature|authorization|cookie)[a-z0-9_\-]*|otel_exporter_otlp_[a-z_]*headers|pass|pwd|sig|auth)";

#[expect(clippy::expect_used, reason = "the patterns are constants; the tests compile every one")]
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern is valid")
}

/// `scheme://user:password@host` or `scheme://token@host`; up to the last `@` before the path.
static URL: LazyLock<Regex> =
    LazyLock::new(|| pattern(r#"(?i)\b([a-z][a-z0-9+.\-]*://)([^\s/?#"'<>]*)@"#));

/// The same with a password that should have been percent-encoded; up to the last `@` of the word.
static RAW_URL: LazyLock<Regex> =
    LazyLock::new(|| pattern(r#"(?i)\b([a-z][a-z0-9+.\-]*://)([^\s:/?#"'<>@]*):([^\s<>]*)@"#));

/// `Bearer xyz`, `Basic xyz`.
static SCHEME: LazyLock<Regex> =
    LazyLock::new(|| pattern(r#"(?i)\b(bearer|basic)(\s+|%20)[^\s"',;]{4,}"#));

/// A name and the text before its value: `name = `, `name: `, `"name":`, also escaped or percent-encoded; and a flag
/// whose value is the next word, `--name value` or `"--name", "value"`.
static SETTING: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r#"(?i)\b({SECRET_NAME})(?:\\*["'])?\s*(?:=|:|%3d)\s*|(?:^|[\s"'(\[])--?({SECRET_NAME})(?:\\*["'])?,?\s+"#
    ))
});

static FLAG: LazyLock<Regex> = LazyLock::new(|| pattern(&format!("(?i)^--?{SECRET_NAME}$")));

/// Lines or words that are keys as a whole.
static KEY: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"(?is)AGE-SECRET-KEY-[a-z0-9\-]+|(-----BEGIN [a-z0-9 ]*PRIVATE KEY-----).*?(-----END [a-z0-9 ]*PRIVATE KEY-----|\z)",
    )
});

/// The text with every secret replaced by `***`.
pub fn redact(text: &str) -> Cow<'_, str> {
    // Without one of these characters no pattern matches, which is the case for most texts.
    if !text.bytes().any(|b| matches!(b, b':' | b'=' | b'@' | b' ' | b'%' | b'-')) {
        return Cow::Borrowed(text);
    }
    let step = KEY.replace_all(text, MASK);
    let step = replace(step, &RAW_URL, |c| {
        let (user, rest) = (&c[2], &c[3]);
        let first = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let port = !first.is_empty() && first.bytes().all(|b| b.is_ascii_digit());
        // The `@` is in a path, after a host and its port.
        if port {
            return c[0].to_owned();
        }
        format!("{}{user}:{MASK}@", &c[1])
    });
    let step = replace(step, &URL, |c| {
        // The user name is not secret if a password follows; alone it may be a token.
        match c[2].split_once(':') {
            Some((user, _)) => format!("{}{user}:{MASK}@", &c[1]),
            None => format!("{}{MASK}@", &c[1]),
        }
    });
    let step = replace(step, &SCHEME, |c| format!("{}{}{MASK}", &c[1], &c[2]));
    match settings(&step) {
        Some(changed) => Cow::Owned(changed),
        None => step,
    }
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

/// The values of all settings with a secret name replaced; `None` if there are none.
fn settings(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut done = 0;
    while let Some(found) = SETTING.captures_at(text, done) {
        let (Some(all), Some(name)) = (found.get(0), found.get(1).or(found.get(2))) else { break };
        let rest = &text[all.end()..];
        let (open, value) = match found.get(2) {
            // The next word is a flag, so this one has no value.
            Some(_) if rest.starts_with('-') => (0, ""),
            _ => value(&text[..name.start()], rest, name.as_str()),
        };
        out.push_str(&text[done..all.end() + open]);
        if !value.is_empty() {
            out.push_str(MASK);
        }
        // The closing quote stays where it is.
        done = all.end() + open + value.len();
    }
    if out.is_empty() {
        return None;
    }
    out.push_str(&text[done..]);
    Some(out)
}

/// Length of the opening quote, and the value behind it.
fn value<'a>(before: &str, rest: &'a str, name: &str) -> (usize, &'a str) {
    let escapes = rest.bytes().take_while(|b| *b == b'\\').count();
    match rest.as_bytes().get(escapes) {
        Some(quote @ (b'"' | b'\'')) => {
            let body = &rest[escapes + 1..];
            (escapes + 1, &body[..quoted(body, *quote, escapes)])
        }
        _ => (0, &rest[..bare(before, rest, name)]),
    }
}

/// Where a value ends that was opened by `quote` with this many backslashes before it. If there is no end, the value
/// is the rest of the text.
fn quoted(body: &str, quote: u8, escapes: usize) -> usize {
    let bytes = body.as_bytes();
    let (mut at, mut backslashes) = (0, 0);
    while at < bytes.len() {
        let here = bytes[at];
        let plain = match (quote, escapes) {
            // The whole text may be quoted once more, with its backslashes doubled; in doubt the value goes on.
            (b'\'', 0) => backslashes == 0,
            (_, 0) => backslashes % 2 == 0,
            _ => backslashes <= escapes,
        };
        if here == quote && plain {
            // In SQL, two quotes stand for one.
            if quote == b'"' || bytes.get(at + 1) != Some(&quote) {
                return at - backslashes.min(escapes);
            }
            at += 1;
        }
        backslashes = if here == b'\\' { backslashes + 1 } else { 0 };
        at += 1;
    }
    body.len()
}

/// Where a value without quotes ends: at a space, except in headers that contain several words; in a query at the next
/// parameter; inside quotes at their end. A comma or semicolon may be part of it.
fn bare(before: &str, rest: &str, name: &str) -> usize {
    let name = name.to_ascii_lowercase();
    let line = name.contains("authorization") || name.contains("cookie");
    let query = before.ends_with(['?', '&']);
    // An odd number of quotes before means that the whole setting is inside quotes.
    let within = |quote: char| before.matches(quote).count() % 2 == 1;
    let (single, double) = (within('\''), within('"'));
    let mut escaped = false;
    let mut end = rest.len();
    for (at, c) in rest.char_indices() {
        let over = match c {
            '\n' | '\r' => true,
            '&' | '#' => query,
            '"' => double && !escaped,
            '\'' => single && !escaped && closes(&rest[at + 1..]),
            // In libpq, a backslash makes the next character part of the value.
            c if c.is_whitespace() => !escaped && !line,
            _ => false,
        };
        if over {
            end = at;
            break;
        }
        // Backslashes are not counted, because the whole text may be quoted once more, with its backslashes doubled.
        escaped = c == '\\';
    }
    rest[..end].trim_end_matches(['\\', ')', ']', '}', ',', ';']).len()
}

/// Whether the quote before `next` can be a closing one, and not an apostrophe.
fn closes(next: &str) -> bool {
    next.chars().next().is_none_or(|c| c.is_whitespace() || ",:;.)]}\"".contains(c))
}

/// Whether a field or an attribute of this name contains a secret, whatever its value looks like.
pub(crate) fn is_secret_name(name: &str) -> bool {
    static NAME: LazyLock<Regex> = LazyLock::new(|| pattern(&format!("(?i)^(?:{SECRET_NAME})$")));
    NAME.is_match(name)
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
            ("postgres://u:p/s?s#s@db/x", "postgres://u:***@db/x"),
            ("https://host/path@2", "https://host/path@2"),
            ("https://host:8080/path@2", "https://host:8080/path@2"),
            ("host=db password=hunter2 user=a", "host=db password=*** user=a"),
            (r"host=db password='it''s \' me' user=a", "host=db password='***' user=a"),
            (r"host=db password='no end to it", "host=db password='***"),
            (r"host=db password=a\ b\'c user=a", "host=db password=*** user=a"),
            ("host=db password=a,b;c'd user=a", "host=db password=*** user=a"),
            ("?sslpassword=x&y=1", "?sslpassword=***&y=1"),
            ("host=db password=a&b user=c", "host=db password=*** user=c"),
            ("password=x, user=y", "password=***, user=y"),
            ("authorization: Bearer abcdef.ghi", "authorization: ***"),
            ("authorization: ApiKey abc def", "authorization: ***"),
            ("sent Bearer abcdef.ghi away", "sent Bearer *** away"),
            ("authorization=Bearer%20xyzw,x-other=1", "authorization=***"),
            ("https://b/k?X-Amz-Signature=ff00&x=1", "https://b/k?X-Amz-Signature=***&x=1"),
            ("https://b/k?sv=1&sig=a%2Fb&x=1", "https://b/k?sv=1&sig=***&x=1"),
            (r#"{"secret_access_key":"abc def"}"#, r#"{"secret_access_key":"***"}"#),
            (r#""{\"password\":\"a b\",\"c\":1}""#, r#""{\"password\":\"***\",\"c\":1}""#),
            (r#"found "password=x", expected y"#, r#"found "password=***", expected y"#),
            ("--api-key=xyz", "--api-key=***"),
            ("klio --token xyz list", "klio --token *** list"),
            ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY=***"),
            ("PGPASSWORD=abc", "PGPASSWORD=***"),
            ("OTEL_EXPORTER_OTLP_HEADERS=a=b,c=d", "OTEL_EXPORTER_OTLP_HEADERS=***"),
            ("AGE-SECRET-KEY-1QQQ in it", "*** in it"),
            ("-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\nx", "***\nx"),
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
