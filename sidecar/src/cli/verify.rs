//! `klio verify`: has the server verify what is stored. Damage has exit statuses of its own, even if it was repaired.

use super::{
    args::VerifyArgs,
    connect, exit, print, print_json, say_elsewhere, text,
    work::{Answer, follow},
};
use crate::{
    config::Config,
    error::{Error, Failure},
    server_link::which,
};
use klio_proto::v1::{VerifyRequest, VerifyResponse, verify_response};
use klio_storage::catalog::VerifyOutcome;

const DOING: &str = "verify";

pub(super) async fn run(config: &Config, args: &VerifyArgs) -> Result<u8, Error> {
    let connection = connect(config).await?;
    let which = which(&connection, &config.cluster()?).await?;
    let request = VerifyRequest {
        cluster: which.name.to_string(),
        backup_name: args.backup.clone().unwrap_or_default(),
        read_percent: percent(&args.read_data)?,
        wal: args.wal,
    };
    let answers = connection.base().verify(request).await;
    let answers = answers.map_err(|status| Error::from_status(DOING, &status))?.into_inner();
    let read = |answer: VerifyResponse| match answer.kind? {
        verify_response::Kind::Progress(step) => Some(Answer::Step(step)),
        verify_response::Kind::Outcome(bytes) => Some(Answer::Outcome(bytes)),
    };
    let outcome: VerifyOutcome = follow(DOING, answers, args.json, read).await?;
    match args.json {
        true => print_json(&which, &outcome)?,
        false => print(&(which.line() + &summary(&outcome))),
    }
    if outcome.backups.is_empty() {
        say_elsewhere(&connection, &which).await;
    }
    Ok(status(&outcome))
}

fn percent(text: &str) -> Result<f64, Error> {
    if text == "all" {
        return Ok(100.0);
    }
    let number = text.trim_end_matches('%').parse().ok();
    number.filter(|percent| (0.0..=100.0).contains(percent)).ok_or_else(|| {
        let detail = format!("read --read-data: expected all or 0 to 100, found {text:?}");
        Error::new(Failure::Config, detail)
    })
}

/// Repaired damage, remaining damage and no damage have different statuses. If there is no backup to verify, nothing
/// was proven, which is a problem: most often the cluster's name is wrong.
const fn status(outcome: &VerifyOutcome) -> u8 {
    match (outcome.damaged.is_empty(), outcome.repaired.is_empty()) {
        (true, true) if outcome.backups.is_empty() => exit::PROBLEM,
        (true, true) => exit::OK,
        (true, false) => exit::REPAIRED,
        (false, _) => exit::DAMAGED,
    }
}

fn summary(outcome: &VerifyOutcome) -> String {
    let mut out = String::new();
    for damage in &outcome.damaged {
        out += &format!("DAMAGED   {} {}: {}\n", damage.tier, damage.key, damage.problem);
    }
    for damage in &outcome.repaired {
        out += &format!("repaired  {} {}: {}\n", damage.tier, damage.key, damage.problem);
    }
    let verdict = match (outcome.damaged.len(), outcome.repaired.len()) {
        (0, 0) if outcome.backups.is_empty() => "nothing was verified".to_owned(),
        (0, 0) => "all good".to_owned(),
        (0, repaired) => format!("{repaired} damaged, all repaired from the other tier"),
        (damaged, repaired) => format!("{damaged} DAMAGED, {repaired} repaired"),
    };
    out + &format!(
        "{} backups: {verdict}; {} files, {} read, {} % of the packs, in {}; {}\n",
        outcome.backups.len(),
        outcome.files,
        text::size(outcome.read_bytes),
        outcome.read_percent,
        text::duration(outcome.duration_seconds),
        coverage(outcome),
    )
}

/// How old the oldest verification of the data is. Older servers do not say it.
fn coverage(outcome: &VerifyOutcome) -> String {
    match outcome.all_read_since_unix {
        Some(since) => {
            let within = (outcome.finished_unix - since).max(0.0);
            format!("all data read within {}", text::duration(within))
        }
        None => "not all data was read yet".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::catalog::Damage;

    fn outcome(damaged: usize, repaired: usize) -> VerifyOutcome {
        let damage =
            Damage { tier: "tier2".into(), key: "pg/base/config".into(), problem: "x".into() };
        VerifyOutcome {
            backups: vec!["a".parse().unwrap()],
            ok: damaged == 0,
            finished_unix: 1.0,
            duration_seconds: 2.0,
            read_percent: 10.0,
            all_read_since_unix: None,
            read_bytes: 5,
            files: 3,
            damaged: vec![damage.clone(); damaged],
            repaired: vec![damage; repaired],
        }
    }

    #[test]
    fn the_exit_status_tells_damaged_from_repaired_from_good() {
        let all = [(0, 0), (0, 2), (2, 0), (1, 1)].map(|(d, r)| status(&outcome(d, r)));
        assert_eq!(all, [exit::OK, exit::REPAIRED, exit::DAMAGED, exit::DAMAGED]);
        assert!(summary(&outcome(1, 1)).contains("1 DAMAGED, 1 repaired"));
        assert!(summary(&outcome(0, 0)).contains("not all data was read yet"));
        let read = VerifyOutcome {
            all_read_since_unix: Some(100.0),
            finished_unix: 100.0 + 9.0 * 86_400.0,
            ..outcome(0, 0)
        };
        assert!(summary(&read).contains("all data read within 9"), "{}", summary(&read));
    }

    #[test]
    fn without_a_backup_nothing_is_proven() {
        let none = |damaged| VerifyOutcome { backups: Vec::new(), ..outcome(damaged, 0) };
        assert_eq!(status(&none(0)), exit::PROBLEM);
        assert!(summary(&none(0)).contains("nothing was verified"));
        assert_eq!(status(&none(1)), exit::DAMAGED);
    }

    #[test]
    fn read_data_is_all_or_a_percentage() {
        for (text, expected) in [
            ("all", Some(100.0)),
            ("7.5", Some(7.5)),
            ("10%", Some(10.0)),
            ("101", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(percent(text).ok(), expected, "{text}");
        }
    }
}
