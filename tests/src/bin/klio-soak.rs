//! `make soak`: rounds of the restore proof, one after the other, for as long as wanted.
//!
//! `klio-soak [--rounds N] [--seed S]`: round `i` has the seed `S + i`. One line for each round; a failed one keeps its scratch
//! folders, says how to be run again, and the next one begins. Ends with 1 when any round failed.

use klio_tests::{
    proof::{Plan, Report, round},
    scratch,
};
use std::{process::ExitCode, time::Duration};
use tokio::task::JoinSet;

const USAGE: &str = "usage: klio-soak [--rounds N] [--seed S]";
/// A round that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(900);

fn parse(mut args: impl Iterator<Item = String>) -> Option<(u64, u64)> {
    let (mut rounds, mut seed) = (20, rand::random::<u32>().into());
    while let Some(name) = args.next() {
        let value = args.next()?.parse().ok()?;
        match name.as_str() {
            "--rounds" => rounds = value,
            "--seed" => seed = value,
            _ => return None,
        }
    }
    Some((rounds, seed))
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let Some((rounds, seed)) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    scratch::keep_failed();
    let mut failed = Vec::new();
    for number in 0..rounds {
        let seed = seed + number;
        match one(seed).await {
            Ok(report) => println!("round {} seed {seed}: ok, {report}", number + 1),
            Err(why) => {
                println!(
                    "round {} seed {seed}: FAILED; again: make soak ROUNDS=1 SEED={seed}\n{why}",
                    number + 1
                );
                failed.push(seed);
            }
        }
    }
    println!("{} of {rounds} rounds good; failed seeds: {failed:?}", rounds - failed.len() as u64);
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// A round on a task of its own, so that its panic ends it alone.
async fn one(seed: u64) -> Result<Report, String> {
    let mut task = JoinSet::new();
    task.spawn(async move { round(seed, &Plan::soak()).await });
    match tokio::time::timeout(LONGEST, task.join_next()).await {
        Ok(Some(Ok(report))) => Ok(report),
        Ok(Some(Err(error))) => Err(match error.try_into_panic() {
            Ok(panic) => panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_else(|| "a panic without a message".to_owned()),
            Err(error) => error.to_string(),
        }),
        Ok(None) => Err("no task".to_owned()),
        Err(_) => Err(format!("it hangs: no end within {LONGEST:?}")),
    }
}
