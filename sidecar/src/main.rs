//! `klio`: the sidecar daemon and all commands for people.
//!
//! Everything is done in [`klio_sidecar::cli::main`], which also decides the exit status.

fn main() -> std::process::ExitCode {
    klio_sidecar::cli::main(std::env::args_os().collect()).into()
}
