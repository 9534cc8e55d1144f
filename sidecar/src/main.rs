//! `klio`: the sidecar daemon and every command a person types.
//!
//! Only hands over; every way out goes through [`klio_sidecar::cli::main`] and its exit statuses.

fn main() -> std::process::ExitCode {
    klio_sidecar::cli::main(std::env::args_os().collect()).into()
}
