//! The generated references are what the code says now.

use klio_tests::{env, programs};
use std::process::Command;

#[tokio::test]
async fn generated_references_have_not_drifted() {
    let programs_dir = programs::klio_server().parent().expect("a directory").to_owned();
    let mut command = Command::new(env::repository().join("deploy/tools/docs.sh"));
    command.arg("--check").arg(programs_dir);
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
}
