//! An S3 endpoint as a program of its own, for `make demo` and for trying things by hand.
//!
//! `klio-test-s3 --root DIR --port N [--access-key K] [--secret-key S] [--bucket B]`: serves HTTP on 127.0.0.1 until it gets
//! SIGINT or SIGTERM. The bucket is created when absent. Not for production: s3s-fs does not sync what it writes.

use klio_tests::s3::{ACCESS_KEY, BUCKET, S3, SECRET_KEY, Settings};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str =
    "usage: klio-test-s3 --root DIR --port N [--access-key K] [--secret-key S] [--bucket B]";

fn parse(args: impl Iterator<Item = String>) -> Result<Settings, String> {
    let mut settings = Settings {
        root: "".into(),
        bucket: BUCKET.to_owned(),
        port: 0,
        access_key: ACCESS_KEY.to_owned(),
        secret_key: SECRET_KEY.to_owned(),
    };
    let mut args = args;
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("option {name}: expected a value"))?;
        match name.as_str() {
            "--root" => settings.root = value.into(),
            "--bucket" => settings.bucket = value,
            "--access-key" => settings.access_key = value,
            "--secret-key" => settings.secret_key = value,
            "--port" => {
                settings.port = value.parse().map_err(|_| {
                    format!("option --port: expected a number up to 65535, found {value}")
                })?;
            }
            other => return Err(format!("unknown option {other}")),
        }
    }
    if settings.root.as_os_str().is_empty() || settings.port == 0 {
        return Err("options --root and --port are needed".to_owned());
    }
    Ok(settings)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<ExitCode> {
    let settings = match parse(std::env::args().skip(1)) {
        Ok(settings) => settings,
        Err(problem) => {
            eprintln!("klio-test-s3: {problem}\n{USAGE}");
            return Ok(ExitCode::from(2));
        }
    };
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let s3 = S3::open(settings, None);
    println!("serving bucket {} at {}", s3.settings().bucket, s3.endpoint());
    tokio::select! {
        _ = int.recv() => {}
        _ = term.recv() => {}
    }
    Ok(ExitCode::SUCCESS)
}
