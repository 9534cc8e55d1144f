//! Records of every type and from three times: older ones (`format1/`, written by the first builds), current ones, and
//! ones from future versions.

use super::*;
use crate::{
    catalog::{BackupRecord, DrillOutcome, KnownDamage, MaintenanceOutcome, VerifyOutcome},
    disk::SimDisk,
    repository::Secret,
    wal::{Gap, Horizon, Pinned},
};
use proptest::prelude::*;
use serde_json::{Value, json};

macro_rules! files {
    ($($name:literal),*) => { [$(($name, include_str!(concat!("format1/", $name, ".json")))),*] };
}

const OF_BEFORE: [(&str, &str); 9] = files!(
    "cluster",
    "gaps",
    "horizon",
    "backup",
    "verify",
    "drill",
    "damaged",
    "maintenance",
    "repository"
);

/// Parses a record as its type, and writes it again.
fn again(name: &str, bytes: &[u8]) -> Result<Value, Error> {
    fn through<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<Value, Error> {
        decode(&encode(&decode::<T>(bytes, "x")?, "x")?, "x")
    }
    match name {
        "cluster" => {
            let disk = SimDisk::new(1);
            let path = Path::new("/cluster.json");
            durable::overwrite(&disk, path, bytes)?;
            let pinned = Pinned::decode(bytes, "x")?;
            crate::wal::store_pinned(&disk, path, &pinned)?;
            Ok(load(&disk, path)?.unwrap_or_default())
        }
        "gaps" => through::<Vec<Gap>>(bytes),
        "horizon" => through::<Vec<Horizon>>(bytes),
        "backup" => through::<BackupRecord>(bytes),
        "verify" => through::<VerifyOutcome>(bytes),
        "drill" => through::<DrillOutcome>(bytes),
        "damaged" => through::<KnownDamage>(bytes),
        "maintenance" => through::<MaintenanceOutcome>(bytes),
        _ => through::<Secret>(bytes),
    }
}

fn body_of(text: &str) -> Value {
    serde_json::from_str::<Value>(text).unwrap()["body"].clone()
}

/// The object, or each object of a list: the places where a future version adds its fields.
fn objects(body: &mut Value) -> Vec<&mut serde_json::Map<String, Value>> {
    match body {
        Value::Array(all) => all.iter_mut().filter_map(Value::as_object_mut).collect(),
        one => one.as_object_mut().into_iter().collect(),
    }
}

/// A record with the checksum of the first builds: of the body without white space.
fn stamped_as_before(body: &Value) -> Vec<u8> {
    let crc = sum(&serde_json::to_string(body).unwrap());
    serde_json::to_vec_pretty(&json!({ "format": 1, "crc32c": crc, "body": body })).unwrap()
}

#[test]
fn records_of_the_first_builds_are_read() {
    for (name, text) in OF_BEFORE {
        let found = again(name, text.as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = body_of(text);
        assert_eq!(found, expected, "{name}");
        let tampered = text.replacen('1', "2", 40);
        assert!(again(name, tampered.as_bytes()).is_err(), "{name}");
    }
}

#[test]
fn fields_of_a_version_to_come_pass_and_are_kept_where_a_record_is_written_again() {
    for (name, text) in OF_BEFORE {
        let mut body = body_of(text);
        for object in objects(&mut body) {
            object.insert("of_a_version_to_come".into(), json!({ "a": [1.5, "x"], "b": null }));
        }
        // Unknown fields are not preserved in the secret and in results that only the server makes, as a whole each
        // time.
        let kept = !matches!(name, "verify" | "maintenance" | "repository");
        let expected = if kept { body.clone() } else { body_of(text) };
        for bytes in [encode(&body, name).unwrap(), stamped_as_before(&body)] {
            let found = again(name, &bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(found, expected, "{name}");
        }
    }
}

/// Fields that were added after the first builds: an older record has none of them.
#[test]
fn records_of_a_version_gone_have_fewer_fields() {
    let later: [(&str, &[&str]); 3] = [
        ("backup", &["tablespace_map", "tablespaces", "label", "keep"]),
        ("damaged", &["packs", "others"]),
        ("maintenance", &["alarm"]),
    ];
    for (name, fields) in later {
        let (_, text) = OF_BEFORE.into_iter().find(|(there, _)| *there == name).unwrap();
        let mut body = body_of(text);
        for object in objects(&mut body) {
            fields.iter().for_each(|field| drop(object.remove(*field)));
        }
        for bytes in [encode(&body, name).unwrap(), stamped_as_before(&body)] {
            again(name, &bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

#[test]
fn a_newer_format_is_refused_as_newer_and_left_alone() {
    let disk = SimDisk::new(1);
    let path = Path::new("/r.json");
    for text in [r#"{"format": 3, "anything": {}}"#, r#"{"format":4294967295,"body":[]}"#] {
        durable::overwrite(&disk, path, text.as_bytes()).unwrap();
        for error in [load::<Value>(&disk, path).unwrap_err(), prove(&disk, path).unwrap_err()] {
            assert_eq!(error.kind, Kind::Newer);
            assert!(error.to_string().contains("written by a newer Klio"), "{error}");
            assert!(!error.to_string().contains("corrupt"), "{error}");
        }
        assert_eq!(read_small(&disk, path, 99).unwrap(), text.as_bytes());
    }
    for text in [r#"{"format": 0, "crc32c": "00000000", "body": 1}"#, r#"{"format": 2}"#, "{}"] {
        assert_eq!(
            decode::<Value>(text.as_bytes(), "x").unwrap_err().kind,
            Kind::Corrupt,
            "{text}"
        );
    }
}

#[test]
fn proving_a_record_leaves_its_bytes_as_they_are() {
    let disk = SimDisk::new(1);
    let path = Path::new("/r.json");
    prove(&disk, path).unwrap();
    for (_, text) in OF_BEFORE {
        durable::overwrite(&disk, path, text.as_bytes()).unwrap();
        prove(&disk, path).unwrap();
        assert_eq!(read_small(&disk, path, LIMIT_BYTES).unwrap(), text.as_bytes());
    }
}

fn body() -> impl Strategy<Value = Value> {
    prop::collection::btree_map("[a-z]{1,4}", "[ -~\n\"{}]{0,20}", 0..6).prop_map(|map| json!(map))
}

proptest! {
    #[test]
    fn a_record_round_trips(body in body()) {
        prop_assert_eq!(decode::<Value>(&encode(&body, "x").unwrap(), "x").unwrap(), body);
    }

    #[test]
    fn no_cut_and_no_flipped_bit_of_a_record_passes_for_another(body in body(), at: prop::sample::Index, bit in 0u8..8) {
        let good = encode(&body, "x").unwrap();
        let at = at.index(good.len());
        if let Ok(found) = decode::<Value>(&good[..at], "x") {
            // Only the newline at the end is missing.
            prop_assert_eq!(&found, &body);
        }
        let mut flipped = good;
        flipped[at] ^= 1 << bit;
        if let Ok(found) = decode::<Value>(&flipped, "x") {
            prop_assert_eq!(found, body);
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>) {
        let _ = decode::<Value>(&bytes, "x");
    }
}
