//! Reads PostgreSQL's configuration files as PostgreSQL does (`src/backend/utils/misc/guc-file.l`).
//!
//! A line has a name, optionally `=`, a value, and optionally a comment. A quote within quotes is doubled or escaped.
//! Names are case-insensitive. Lines with a syntax error are skipped, since PostgreSQL does not start with them either. Pure.

/// One line: a setting or an include.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// In lower case.
    pub name: String,
    /// Without quotes.
    pub value: String,
    /// Line number, from 0.
    pub line: usize,
}

/// The settings and includes of a file, in order.
pub fn parse(text: &[u8]) -> Vec<Item> {
    let lines = text.split(|byte| *byte == b'\n').enumerate();
    let item = |(number, line): (usize, &[u8])| {
        let line = String::from_utf8_lossy(line);
        let (name, rest) = name_of(&line)?;
        let rest = rest.trim_start();
        let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
        Some(Item { name, value: value_of(rest), line: number })
    };
    lines.filter_map(item).collect()
}

/// The name at the start of a line, in lower case, and the rest of the line.
pub fn name_of(line: &str) -> Option<(String, &str)> {
    let line = line.trim_start();
    let end = line.find(|c: char| c.is_ascii() && !c.is_ascii_alphanumeric() && !"_.$".contains(c));
    let (name, rest) = line.split_at(end.unwrap_or(line.len()));
    (!name.is_empty()).then(|| (name.to_ascii_lowercase(), rest))
}

fn value_of(text: &str) -> String {
    let Some(quoted) = text.strip_prefix('\'') else {
        let end = text.find(|c: char| c.is_whitespace() || c == '#');
        return text[..end.unwrap_or(text.len())].to_owned();
    };
    let mut value = String::new();
    let mut chars = quoted.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() == Some(&'\'') => drop(chars.next().map(|_| value.push('\''))),
            '\'' => break,
            '\\' => match chars.next() {
                Some('n') => value.push('\n'),
                Some('t') => value.push('\t'),
                Some('r') => value.push('\r'),
                Some(digit @ '0'..='7') => value.push(octal(digit, &mut chars)),
                Some(other) => value.push(other),
                None => {}
            },
            _ => value.push(c),
        }
    }
    value
}

fn octal(first: char, chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> char {
    let mut code = first.to_digit(8).unwrap_or(0);
    for _ in 0..2 {
        let Some(digit) = chars.peek().and_then(|c| c.to_digit(8)) else { break };
        chars.next();
        code = code * 8 + digit;
    }
    char::from_u32(code & 0xFF).unwrap_or('?')
}

/// A line that sets `name` to `value`.
pub fn line(name: &str, value: &str) -> String {
    format!("{name} = '{}'\n", value.replace('\\', r"\\").replace('\'', "''"))
}

/// Turns the lines with these numbers (from 0) into comments that begin with `klio restore:`.
pub fn silence(text: &[u8], lines: &[usize]) -> Vec<u8> {
    let each = text.split(|byte| *byte == b'\n').enumerate();
    let each: Vec<Vec<u8>> = each
        .map(|(number, line)| match lines.contains(&number) {
            true => [b"# klio restore: ", line].concat(),
            false => line.to_vec(),
        })
        .collect();
    each.join(&b'\n')
}

/// Reads a boolean as PostgreSQL does; `None` if it is not a valid boolean.
pub fn boolean(value: &str) -> Option<bool> {
    let value = value.to_ascii_lowercase();
    let begins = |word: &str, least: usize| value.len() >= least && word.starts_with(&value);
    match value.as_str() {
        "1" => Some(true),
        "0" => Some(false),
        _ if begins("true", 1) || begins("yes", 1) || value == "on" => Some(true),
        _ if begins("false", 1) || begins("no", 1) || begins("off", 2) => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> (String, String) {
        let items = parse(line.as_bytes());
        assert_eq!(items.len(), 1, "{line}");
        (items[0].name.clone(), items[0].value.clone())
    }

    #[test]
    fn lines_are_read_as_postgresql_reads_them() {
        for (line, name, value) in [
            ("work_mem = '8MB'", "work_mem", "8MB"),
            ("\t Recovery_Target_Time'2020-01-01'", "recovery_target_time", "2020-01-01"),
            ("port 5433 # why", "port", "5433"),
            ("a.b='it''s \\'x\\' \\101'#c", "a.b", "it's 'x' A"),
            ("include_dir = conf.d", "include_dir", "conf.d"),
            ("data_directory=", "data_directory", ""),
        ] {
            assert_eq!(one(line), (name.to_owned(), value.to_owned()), "{line}");
        }
        assert!(parse(b"# work_mem = 1\n\n   \n'x' = 2\n").is_empty());
        let items = parse(b"# no\nbytes = '\xff'\nlast = 1");
        assert_eq!((items[0].line, items[1].line, items.len()), (1, 2, 2));
    }

    #[test]
    fn silenced_lines_are_comments_and_nothing_else_changes() {
        let text = b"a = 1\nb = '\xff'\nc = 3";
        let silent = silence(text, &[1]);
        assert_eq!(silent, b"a = 1\n# klio restore: b = '\xff'\nc = 3");
        assert_eq!(silence(text, &[]), text);
        let names: Vec<String> = parse(&silent).into_iter().map(|item| item.name).collect();
        assert_eq!(names, ["a", "c"]);
    }

    #[test]
    fn booleans_have_many_spellings() {
        for (text, expected) in [
            ("on", Some(true)),
            ("TRUE", Some(true)),
            ("y", Some(true)),
            ("of", Some(false)),
            ("always", None),
        ] {
            assert_eq!(boolean(text), expected, "{text}");
        }
    }
}
