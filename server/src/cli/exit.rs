//! Exit statuses of `klio-server`, all in this table. docs/errors.md is generated from it.

/// The command failed; the message says why.
pub const FAILED: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// The identity for encryption at rest is missing, or is the wrong one.
pub const NO_KEY: u8 = 3;

/// Every status and what it means, ascending.
pub const STATUSES: [(u8, &str); 4] = [
    (0, "done"),
    (
        FAILED,
        "the command failed; for run: the server could not start, or stopped because of an error",
    ),
    (USAGE, "wrong usage"),
    (NO_KEY, "the identity for encryption at rest is missing or is the wrong one"),
];

/// For `--help`.
pub fn help() -> String {
    let rows = STATUSES.map(|(status, meaning)| format!("  {status}  {meaning}"));
    format!("Exit statuses:\n{}", rows.join("\n"))
}
