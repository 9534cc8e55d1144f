//! Splits the two forms of a connection string into keywords and values.
//!
//! Keyword form: `host = db password = 'it''s'`… with backslash escapes, as libpq reads it.
//! URI form: `postgresql://user:password@host:port,host2/db?keyword=value`, percent-encoded.
//! Errors contain a position, never the text around it, which may be a password.

use super::ConnInfoError;

/// Keywords and values in their order; a later value replaces an earlier one.
pub(super) type Pairs = Vec<(String, String)>;

/// Splits a connection string, which is a URI or a list of keywords and values. In a URI, the position of an error is where
/// the faulty part begins.
pub(super) fn tokenise(text: &str) -> Result<Pairs, ConnInfoError> {
    let trimmed = text.trim_start();
    match ["postgresql://", "postgres://"].iter().find_map(|p| trimmed.strip_prefix(p)) {
        Some(rest) => uri(rest, text.len() - rest.len()),
        None => keywords(text),
    }
}

fn syntax(at: usize, problem: impl Into<String>) -> ConnInfoError {
    ConnInfoError::Syntax { at, problem: problem.into() }
}

fn keywords(text: &str) -> Result<Pairs, ConnInfoError> {
    let mut chars = text.chars().enumerate().peekable();
    let mut pairs = Pairs::new();
    loop {
        while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {}
        let Some(&(start, _)) = chars.peek() else { return Ok(pairs) };
        let mut name = String::new();
        while let Some((_, c)) = chars.next_if(|(_, c)| *c != '=' && !c.is_whitespace()) {
            name.push(c);
        }
        while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {}
        if name.is_empty() || chars.next_if(|(_, c)| *c == '=').is_none() {
            // The message must not show the word: it may be half of a badly quoted password.
            return Err(syntax(start, "expected keyword=value"));
        }
        while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {}
        pairs.push((name, value(&mut chars)?));
    }
}

type Chars<'a> = std::iter::Peekable<std::iter::Enumerate<std::str::Chars<'a>>>;

fn value(chars: &mut Chars<'_>) -> Result<String, ConnInfoError> {
    let quoted = chars.next_if(|(_, c)| *c == '\'').map(|(at, _)| at);
    let mut out = String::new();
    loop {
        match (chars.next(), quoted) {
            (Some((at, '\\')), _) => match chars.next() {
                Some((_, c)) => out.push(c),
                None if quoted.is_some() => return Err(syntax(at, "expected a closing quote")),
                None => return Ok(out),
            },
            (Some((_, '\'')), Some(_)) => return Ok(out),
            (None, Some(at)) => return Err(syntax(at, "expected a closing quote for this one")),
            (None, None) => return Ok(out),
            (Some((_, c)), None) if c.is_whitespace() => return Ok(out),
            (Some((_, c)), _) => out.push(c),
        }
    }
}

fn uri(rest: &str, offset: usize) -> Result<Pairs, ConnInfoError> {
    let mut pairs = Pairs::new();
    let mut push = |name: &str, raw: &str| -> Result<(), ConnInfoError> {
        if !raw.is_empty() {
            pairs.push((name.into(), percent_decode(raw, offset)?));
        }
        Ok(())
    };
    let (main, query) = rest.split_once('?').map_or((rest, ""), |(m, q)| (m, q));
    let (authority, dbname) = main.split_once('/').unwrap_or((main, ""));
    let (login, hosts) =
        authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    push("user", user)?;
    push("password", password)?;
    push("dbname", dbname)?;

    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = split_port(host).ok_or_else(|| {
            syntax(offset, "expected a host as name:port, or an IPv6 address as [address]:port")
        })?;
        names.push(name);
        ports.push(port);
    }
    push("host", &names.join(","))?;
    if ports.iter().any(|p| !p.is_empty()) {
        push("port", &ports.join(","))?;
    }

    let at = offset + main.len() + 1;
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, raw) =
            pair.split_once('=').ok_or_else(|| syntax(at, "expected keyword=value after '?'"))?;
        let name = percent_decode(name, at)?;
        let decoded = percent_decode(raw, at)?;
        // The JDBC driver's spelling, which libpq also accepts.
        pairs.push(match (name.as_str(), decoded.as_str()) {
            ("ssl", "true") => ("sslmode".into(), "require".into()),
            _ => (name, decoded),
        });
    }
    Ok(pairs)
}

fn split_port(host: &str) -> Option<(&str, &str)> {
    match host.strip_prefix('[') {
        Some(inner) => {
            let (name, rest) = inner.split_once(']')?;
            match rest {
                "" => Some((name, "")),
                _ => Some((name, rest.strip_prefix(':')?)),
            }
        }
        None => Some(host.split_once(':').unwrap_or((host, ""))),
    }
}

fn percent_decode(raw: &str, at: usize) -> Result<String, ConnInfoError> {
    let bytes = raw.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] != b'%' {
            out.push(bytes[i]);
            i += 1;
            continue;
        }
        let digit = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16));
        match (digit(bytes.get(i + 1)), digit(bytes.get(i + 2))) {
            (Some(high), Some(low)) if high + low > 0 => out.push((high * 16 + low) as u8),
            _ => return Err(syntax(at, "expected two hexadecimal digits, not 00, after '%'")),
        }
        i += 3;
    }
    String::from_utf8(out).map_err(|_| syntax(at, "expected UTF-8 after percent-decoding"))
}
