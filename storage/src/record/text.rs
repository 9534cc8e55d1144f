//! The text of a JSON document as it is stored, without parsing values into types: what a checksum covers must not
//! depend on which fields a program knows. Pure. Both functions expect a document that a JSON parser has accepted.

/// The position of the next character from `at` on that satisfies `wanted`; strings are skipped.
fn find(text: &[u8], mut at: usize, wanted: impl Fn(u8) -> bool) -> Option<usize> {
    while let Some(byte) = text.get(at) {
        if wanted(*byte) {
            return Some(at);
        }
        at = if *byte == b'"' { after_string(text, at)? } else { at + 1 };
    }
    None
}

/// The position behind the string that begins at `at`.
fn after_string(text: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    loop {
        match text.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// The position behind the value that begins at `at`.
fn after_value(text: &[u8], at: usize) -> Option<usize> {
    match text.get(at)? {
        b'"' => after_string(text, at),
        b'{' | b'[' => {
            let (mut depth, mut at) = (0_usize, at);
            loop {
                at = find(text, at, |b| matches!(b, b'{' | b'[' | b'}' | b']'))?;
                match text[at] {
                    b'{' | b'[' => depth += 1,
                    _ => depth = depth.checked_sub(1)?,
                }
                at += 1;
                if depth == 0 {
                    return Some(at);
                }
            }
        }
        _ => {
            let ends = |b: u8| b.is_ascii_whitespace() || matches!(b, b',' | b'}' | b']');
            Some(find(text, at, ends).unwrap_or(text.len()))
        }
    }
}

/// The value of the member `name` of the document's outermost object, exactly as it is written.
pub(super) fn member<'a>(document: &'a str, name: &str) -> Option<&'a str> {
    let text = document.as_bytes();
    let is_token = |b: u8| !b.is_ascii_whitespace();
    let mut at = find(text, 0, is_token).filter(|at| text[*at] == b'{')? + 1;
    loop {
        let key = find(text, at, is_token).filter(|at| text[*at] == b'"')?;
        let key_end = after_string(text, key)?;
        let colon = find(text, key_end, |b| b == b':')?;
        let value = find(text, colon + 1, is_token)?;
        let end = after_value(text, value)?;
        if document.get(key + 1..key_end - 1)? == name {
            return document.get(value..end);
        }
        at = find(text, end, |b| b == b',')? + 1;
    }
}

/// The same value without white space between its tokens, as a compact JSON writer produces it.
pub(super) fn compact(value: &str) -> String {
    let text = value.as_bytes();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while at < text.len() {
        let end = match text[at] {
            b'"' => after_string(text, at).unwrap_or(text.len()).min(text.len()),
            _ => {
                let stop = |b: u8| b == b'"' || b.is_ascii_whitespace();
                find(text, at, stop).unwrap_or(text.len())
            }
        };
        out.push_str(value.get(at..end).unwrap_or_default());
        at = end;
        while text.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[ -~\"\\\\{}\\[\\]:,\n\tä]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map("[a-z\"\\\\{:, ]{0,6}", inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_member_is_found_as_it_is_written_and_compacted_as_a_writer_would(
            before in value(), body in value(), after in value()
        ) {
            let document = serde_json::json!({ "a": before, "body": body, "c": after });
            let pretty = serde_json::to_string_pretty(&document).unwrap();
            let found = member(&pretty, "body").unwrap();
            prop_assert_eq!(serde_json::from_str::<Value>(found).unwrap(), body.clone());
            prop_assert_eq!(compact(found), serde_json::to_string(&body).unwrap());
            prop_assert_eq!(compact(&pretty), serde_json::to_string(&document).unwrap());
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = (member(&text, "body"), compact(&text));
        }
    }

    #[test]
    fn a_member_inside_another_or_in_a_string_is_not_it() {
        let text = r#"{ "x": {"body": 1}, "y": "\"body\": 2", "body" : 3 }"#;
        assert_eq!(member(text, "body"), Some("3"));
        assert_eq!(member(r#"{"x": {"body": 1}}"#, "body"), None);
        assert_eq!(member("[]", "body"), None);
    }
}
