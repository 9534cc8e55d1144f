//! `make soak`: rounds of the restore proof, one after the other, for as long as wanted.
//!
//! `klio-soak [--rounds N] [--seed S] [--moves NAME,…] [--leg FILE]`: round `i` has the seed `S + i`. One line for each round; a failed
//! one keeps its scratch directories, says how to be run again, and the next one begins. Ends with 1 when any round failed.
//! What must stay true: all rounds of a run have the same programs under test, which are copied before the first one and named by
//! their commit and SHA-256. A leg's file remembers these and the seeds that were good, so that a run that was broken off goes on
//! where it was; with other programs the leg is refused.

use klio_storage::tier2::Sha256Sum;
use klio_tests::{
    env,
    proof::{Move, Moves, Plan, Report, round},
    scratch,
};
use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};
use tokio::task::JoinSet;

const USAGE: &str = "usage: klio-soak [--rounds N] [--seed S] [--moves NAME,...] [--leg FILE]";
/// A round that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(3600);
/// What is under test.
const PROGRAMS: [&str; 2] = ["klio", "klio-server"];

struct Wish {
    rounds: u64,
    seed: u64,
    moves: Moves,
    leg: Option<PathBuf>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Wish, String> {
    let seed = rand::random::<u32>().into();
    let mut wish = Wish { rounds: 20, seed, moves: Moves::default(), leg: None };
    let number =
        |text: &str| text.parse().map_err(|_| format!("expected a number, found {text:?}"));
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name}: expected a value"))?;
        match name.as_str() {
            "--rounds" => wish.rounds = number(&value)?,
            "--seed" => wish.seed = number(&value)?,
            "--moves" => wish.moves = value.parse()?,
            "--leg" => wish.leg = Some(value.into()),
            _ => return Err(format!("{name}: no such option")),
        }
    }
    Ok(wish)
}

/// The programs under test, in a directory of their own so that a build does not change them meanwhile; in words, which they are.
struct Subject {
    directory: tempfile::TempDir,
    name: String,
}

impl Subject {
    fn copy() -> Self {
        let from = env::bin_dir().unwrap_or_else(|| {
            let own = std::env::current_exe().expect("the path of this program");
            own.parent().expect("a program lies in a directory").to_owned()
        });
        let directory = tempfile::tempdir().expect("make a directory for the programs");
        scratch::open_to_others(directory.path());
        let mut name = commit(&from);
        for program in PROGRAMS {
            let bytes = fs::read(from.join(program))
                .unwrap_or_else(|e| panic!("read {}: {e}", from.join(program).display()));
            let sum = Sha256Sum::of(&bytes).to_string();
            name += &format!(" {program} {}", &sum[..16]);
            let copied = fs::copy(from.join(program), directory.path().join(program));
            copied.unwrap_or_else(|e| panic!("copy {program}: {e}"));
        }
        Self { directory, name }
    }
}

/// The commit that is checked out where the programs lie, as far as it is known.
fn commit(from: &Path) -> String {
    let args = ["describe", "--always", "--dirty", "--abbrev=12"];
    let told = Command::new("git").arg("-C").arg(from).args(args).output().ok();
    let told = told.filter(|told| told.status.success());
    told.map_or_else(
        || "unknown".into(),
        |told| String::from_utf8_lossy(&told.stdout).trim().into(),
    )
}

/// The file of a leg: the first line names the programs, every other one a seed that was good.
struct Leg(Option<PathBuf>);

impl Leg {
    fn open(path: Option<PathBuf>, subject: &str) -> Result<(Self, BTreeSet<u64>), String> {
        let Some(path) = path else { return Ok((Self(None), BTreeSet::new())) };
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut lines = text.lines();
        match lines.next() {
            None => Self(Some(path.clone())).note(subject),
            Some(other) if other != subject => {
                let place = path.display();
                return Err(format!("leg {place}: expected programs {other}, found {subject}"));
            }
            Some(_) => {}
        }
        Ok((Self(Some(path)), lines.filter_map(|line| line.parse().ok()).collect()))
    }

    fn note(&self, line: &str) {
        let Some(path) = &self.0 else { return };
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        let mut file = file.unwrap_or_else(|e| panic!("open {}: {e}", path.display()));
        writeln!(file, "{line}").expect("write to the leg's file");
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let wish = parse(std::env::args().skip(1));
    let Ok(wish) = wish.inspect_err(|why| {
        eprintln!("{why}\n{USAGE}\nmoves: {}", Move::ALL.map(Move::name).join(", "));
    }) else {
        return ExitCode::from(2);
    };
    scratch::keep_failed();
    let subject = Subject::copy();
    klio_tests::programs::use_from(subject.directory.path());
    println!("under test: {}", subject.name);
    let (leg, done) = match Leg::open(wish.leg, &subject.name) {
        Ok(leg) => leg,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let mut failed = Vec::new();
    for number in 0..wish.rounds {
        let seed = wish.seed + number;
        if done.contains(&seed) {
            println!("round {} seed {seed}: was good in this leg", number + 1);
            continue;
        }
        match one(seed, Plan::soak().with(wish.moves.clone())).await {
            Ok(report) => {
                leg.note(&seed.to_string());
                println!("round {} seed {seed}: ok, {report}", number + 1);
            }
            Err(why) => {
                println!(
                    "round {} seed {seed}: FAILED; again: make soak ROUNDS=1 SEED={seed}{}\n{why}",
                    number + 1,
                    wish.moves
                );
                failed.push(seed);
            }
        }
    }
    let good = wish.rounds - failed.len() as u64;
    println!("{good} of {} rounds good; failed seeds: {failed:?}", wish.rounds);
    ExitCode::from(u8::from(!failed.is_empty()))
}

/// A round on a task of its own, so that its panic ends it alone.
async fn one(seed: u64, plan: Plan) -> Result<Report, String> {
    let mut task = JoinSet::new();
    task.spawn(async move { round(seed, &plan).await });
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
