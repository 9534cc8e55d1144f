//! Results of simple queries: rows of text.

use super::{
    error::{Error, ServerError},
    wire::{Frame, Wire},
};
use bytes::{Buf, Bytes};
use std::str::FromStr;

/// A row of a result; `None` is NULL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row(pub(super) Vec<Option<Bytes>>);

impl Row {
    pub fn len(&self) -> usize {
        self.0.len()
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The bytes of a column; `None` for NULL or past the end.
    pub fn bytes(&self, column: usize) -> Option<&Bytes> {
        self.0.get(column)?.as_ref()
    }
    /// The text of a column; `None` for NULL, past the end or not UTF-8.
    pub fn text(&self, column: usize) -> Option<&str> {
        std::str::from_utf8(self.bytes(column)?).ok()
    }

    /// Parses a column; NULL is an error.
    pub(super) fn get<T: FromStr>(
        &self,
        op: &str,
        column: usize,
        expected: &str,
    ) -> Result<T, Error> {
        let text = self.text(column);
        text.and_then(|t| t.parse().ok()).ok_or_else(|| {
            Error::protocol(op, format!("expected {expected} in column {column}, found {text:?}"))
        })
    }

    /// Parses the body of a DataRow message.
    pub(super) fn parse(op: &str, mut body: Bytes) -> Result<Row, Error> {
        let short = || Error::protocol(op, "expected a whole row, found a truncated one");
        let count = body.try_get_u16().map_err(|_| short())?;
        let mut columns = Vec::new();
        for _ in 0..count {
            let length = body.try_get_i32().map_err(|_| short())?;
            match usize::try_from(length) {
                Err(_) => columns.push(None),
                Ok(length) if length <= body.len() => columns.push(Some(body.split_to(length))),
                Ok(_) => return Err(short()),
            }
        }
        Ok(Row(columns))
    }
}

/// Runs one command and returns its rows. The connection is then ready for the next command, even after an error that
/// is not fatal.
pub(super) async fn run(wire: &mut Wire, op: &str, sql: &str) -> Result<Vec<Row>, Error> {
    send(wire, op, sql)?;
    let (mut rows, mut failure) = (Vec::new(), None);
    loop {
        let Frame { tag, body } = wire.receive(op).await?;
        match tag {
            b'D' => rows.push(Row::parse(op, body)?),
            b'E' => {
                let error = ServerError::parse(&body);
                if error.is_fatal() {
                    return Err(Error::from_server(op, error));
                }
                failure.get_or_insert(error);
            }
            b'Z' => {
                return match failure {
                    Some(error) => Err(Error::from_server(op, error)),
                    None => Ok(rows),
                };
            }
            b'T' | b'C' | b'I' => {}
            tag => return Err(unexpected(op, "rows", tag)),
        }
    }
}

pub(super) fn send(wire: &mut Wire, op: &str, sql: &str) -> Result<(), Error> {
    postgres_protocol::message::frontend::query(sql, wire.output())
        .map_err(|e| Error::protocol(op, e.to_string()))
}

pub(super) fn unexpected(op: &str, expected: &str, tag: u8) -> Error {
    Error::protocol(op, format!("expected {expected}, found message {:?}", char::from(tag)))
}

/// Expects exactly one row.
pub(super) fn one(op: &str, rows: Vec<Row>) -> Result<Row, Error> {
    let found = rows.len();
    let mut rows = rows.into_iter();
    match (rows.next(), found) {
        (Some(row), 1) => Ok(row),
        _ => Err(Error::protocol(op, format!("expected one row, found {found}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_have_text_and_nulls() {
        let body = Bytes::from_static(b"\0\x02\0\0\0\x02hi\xFF\xFF\xFF\xFF");
        let row = Row::parse("t", body).unwrap();
        assert_eq!((row.len(), row.text(0), row.text(1), row.text(2)), (2, Some("hi"), None, None));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = Row::parse("t", Bytes::from(bytes));
        }
    }
}
