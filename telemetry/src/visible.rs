//! Makes text from others safe to show: on a terminal, in a log line, on a page, in JSON.
//!
//! A control character, an escape sequence or a change of direction in a gap's reason, a label, a name or an error
//! must not move a cursor, hide a line or forge one. Such characters are shown as `\u001b`, which is also how JSON
//! writes them, so JSON text stays the same JSON. Visible characters of every script stay unchanged.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Characters that are invisible and change what is shown: controls (including the C1 set), line and paragraph
/// separators, marks and overrides of direction, characters without width, and tags, which spell invisible text.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{00ad}' | '\u{034f}' | '\u{061c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180e}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}')
}

fn escape(text: &str, keeps: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(|c| is_hidden(c) && !keeps(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !is_hidden(c) || keeps(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    Cow::Owned(out)
}

/// For text of several lines that we wrote: newlines and tabs stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| matches!(c, '\n' | '\t'))
}

/// For text that must stay on one line: nothing in it can begin another line.
pub fn line(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kubernetes 101695: escape sequences in a tenant's text reached the administrator's terminal.
    #[test]
    fn nothing_moves_the_cursor_hides_text_or_begins_a_line() {
        let bad = "x\x1b[2K\x1b[1A\r\nb: problem: run curl\x1b]0;owned\x07\u{9b}8m\u{202e}gpj\u{e0041}\u{7f}";
        let shown = line(bad);
        assert!(!shown.chars().any(|c| is_hidden(c) || c == '\n'), "{shown}");
        assert!(shown.starts_with("x\\u001b[2K\\u001b[1A\\r\\nb: problem"), "{shown}");
        assert!(shown.contains("\\u009b8m\\u202egpj\\udb40\\udc41\\u007f"), "{shown}");
        assert_eq!(lines("a\n\tb\rc"), "a\n\tb\\rc");
    }

    #[test]
    fn what_can_be_seen_stays() {
        for text in ["", "größer als 5 %", "日本語 и русский", "a\\u001b is text", "🙂 – „quoted“"]
        {
            assert!(matches!(line(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn json_stays_the_same_json() {
        let value = serde_json::json!({"reason": "\u{9b}31m\u{202e}\u{e0041}\n\x1b"});
        let shown = lines(&format!("{value:#}\n")).into_owned();
        assert!(!shown.contains('\u{9b}') && !shown.contains('\u{202e}'));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
