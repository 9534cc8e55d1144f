//! What the keys promise (CRYPT1-CRYPT4), against changed bytes and the age program itself.

use super::*;
use crate::crypt::recipients_of;
use std::process::{Command, Stdio};

fn fresh() -> (Keys, Zeroizing<String>, String) {
    let (text, recipient) = Keys::generate();
    (Keys::from_text(&text, &[]).unwrap(), text, recipient)
}

#[test]
fn what_is_wrapped_unwraps_whatever_its_size() {
    let (keys, ..) = fresh();
    for size in [0usize, 1, 100, 65_535, 65_536, 65_537, 200_000] {
        let plain: Vec<u8> = (0..size).map(|n| (n * 7) as u8).collect();
        let sealed = keys.wrap(&plain).unwrap();
        assert_eq!(*keys.unwrap(&sealed).unwrap(), plain, "{size}");
    }
}

#[test]
fn a_header_names_its_recipients() {
    let (_, text, own) = fresh();
    let (_, _, offline) = fresh();
    let keys = Keys::from_text(&text, &[offline.clone(), own.clone()]).unwrap();
    assert_eq!(keys.recipients(), [own.clone(), offline.clone()]);
    let sealed = keys.wrap(b"x").unwrap();
    assert_eq!(recipients_of(&sealed).unwrap(), [own, offline]);
    assert_eq!(recipients_of(b"something else"), None);
}

#[test]
fn a_wrong_identity_is_denied_and_the_right_one_named() {
    let ((keys, _, wanted), (other, _, have)) = (fresh(), fresh());
    let error = other.unwrap(&keys.wrap(b"secret").unwrap()).unwrap_err();
    assert_eq!(error.kind, Kind::Denied);
    let text = error.to_string();
    assert!(text.contains(&wanted) && text.contains(&have), "{text}");
}

#[test]
fn every_bit_flip_is_found() {
    let (keys, ..) = fresh();
    let sealed = keys.wrap(b"forty-two bytes of very secret plain text.").unwrap();
    for bit in 0..sealed.len() * 8 {
        let mut bad = sealed.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let error = keys.unwrap(&bad).expect_err(&format!("bit {bit}"));
        // If the flip makes a header name another recipient, it cannot be told from a wrong key.
        assert!(matches!(error.kind, Kind::Corrupt | Kind::Denied), "bit {bit}: {error}");
    }
}

#[test]
fn every_cut_is_corrupt() {
    let (keys, ..) = fresh();
    let sealed = keys.wrap(&[7; 70_000]).unwrap();
    let marks = [0, 1, 20, 100, 300, 600, 66_000, sealed.len() - 1];
    for cut in marks.into_iter().filter(|cut| *cut < sealed.len()) {
        let error = keys.unwrap(&sealed[..cut]).unwrap_err();
        assert_eq!(error.kind, Kind::Corrupt, "{cut}: {error}");
    }
    let error = keys.unwrap(&[sealed, vec![0]].concat()).unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
}

#[test]
fn an_older_identity_of_the_file_opens_what_was_for_it() {
    let (old, old_text, _) = fresh();
    let (new_text, newest) = IdentityText::generate("now");
    let both = new_text.before(&IdentityText::new(old_text));
    let keys = Keys::of(&both, &[], "test").unwrap();
    assert_eq!(*keys.unwrap(&old.wrap(b"old").unwrap()).unwrap(), b"old");
    let sealed = keys.wrap(b"new").unwrap();
    assert_eq!(recipients_of(&sealed).unwrap(), [newest]);
    assert_eq!(old.unwrap(&sealed).unwrap_err().kind, Kind::Denied);
}

#[test]
fn secrets_are_in_no_message() {
    let (keys, text, _) = fresh();
    let secret = text.lines().last().unwrap();
    assert!(secret.starts_with("AGE-SECRET-KEY-1"));
    let bad = secret.replace("AGE-SECRET-KEY-1", "AGE-SECRET-KEY-2");
    let error = Keys::from_text(&bad, &[]).unwrap_err().to_string();
    assert!(error.contains("line 1") && !error.contains(&secret[20..40]), "{error}");
    let error = Keys::from_text("# nothing\n", &[]).unwrap_err().to_string();
    assert!(error.contains("found none"), "{error}");
    assert!(!format!("{keys:?}").contains("SECRET"));
    assert!(Keys::from_text(&text, &["age1nonsense".into()]).is_err());
}

/// P10: the age program decrypts our files, and its files are decrypted here.
#[test]
fn the_age_program_reads_and_writes_the_same_format() {
    let (keys, text, recipient) = fresh();
    let directory = tempfile::tempdir().unwrap();
    let identity = directory.path().join("identity");
    std::fs::write(&identity, text.as_bytes()).unwrap();
    let plain = vec![9; 100_000];
    let sealed = keys.wrap(&plain).unwrap();
    let run = |arguments: &[&str], input: Vec<u8>| {
        let mut child = Command::new("age")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the age program (apt install age)");
        let mut stdin = child.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().unwrap();
        feeder.join().unwrap().unwrap();
        assert!(output.status.success());
        output.stdout
    };
    let path = identity.to_str().unwrap();
    assert_eq!(run(&["-d", "-i", path], sealed), plain);
    let theirs = run(&["-r", &recipient], plain.clone());
    assert_eq!(*keys.unwrap(&theirs).unwrap(), plain);
}
