//! Tests of the whole store. One concern a file.
