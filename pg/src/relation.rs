//! Parses the names of relation files.
//!
//! `<number>[_fsm|_vm|_init][.<segment>]`, with `t<backend>_` in front for temporary ones
//! (<https://www.postgresql.org/docs/current/storage-file-layout.html>; PostgreSQL's
//! `src/common/relpath.c` and `parse_filename_for_nontemp_relation` in `storage/file/reinit.c`).

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fork {
    /// The relation itself.
    Main,
    /// Free space map.
    FreeSpace,
    /// Visibility map.
    Visibility,
    /// The initial content of an unlogged relation after a crash.
    Init,
}

/// A file of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationFile {
    /// Usually pg_class.relfilenode.
    pub number: u32,
    pub fork: Fork,
    /// 0 for the first segment, which has no number in its file name.
    pub segment: u32,
    /// Whether it belongs to a temporary relation, which ends with its session.
    pub temporary: bool,
}

impl RelationFile {
    /// Parses a file name; `None` for anything else, such as `pg_filenode.map` or `PG_VERSION`.
    pub fn parse(name: &str) -> Option<Self> {
        let (temporary, name) = match name.strip_prefix('t') {
            None => (false, name),
            Some(rest) => {
                let (backend, rest) = rest.split_once('_')?;
                number(backend)?;
                (true, rest)
            }
        };
        let (name, segment) = match name.split_once('.') {
            None => (name, 0),
            // PostgreSQL never writes ".0".
            Some((name, segment)) => (name, number(segment).filter(|n| *n > 0)?),
        };
        let (digits, fork) = match name.split_once('_') {
            None => (name, Fork::Main),
            Some((digits, "fsm")) => (digits, Fork::FreeSpace),
            Some((digits, "vm")) => (digits, Fork::Visibility),
            Some((digits, "init")) => (digits, Fork::Init),
            Some(_) => return None,
        };
        Some(Self { number: number(digits)?, fork, segment, temporary })
    }
}

/// Parses decimal digits without leading zeros.
fn number(digits: &str) -> Option<u32> {
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(number: u32, fork: Fork, segment: u32, temporary: bool) -> Option<RelationFile> {
        Some(RelationFile { number, fork, segment, temporary })
    }

    #[test]
    fn names_are_read_as_postgres_makes_them() {
        for (name, expected) in [
            ("1259", file(1259, Fork::Main, 0, false)),
            ("1259.12", file(1259, Fork::Main, 12, false)),
            ("1259_fsm", file(1259, Fork::FreeSpace, 0, false)),
            ("1259_vm.2", file(1259, Fork::Visibility, 2, false)),
            ("16384_init", file(16384, Fork::Init, 0, false)),
            ("t3_16390", file(16390, Fork::Main, 0, true)),
            ("t12_16390_fsm.1", file(16390, Fork::FreeSpace, 1, true)),
        ] {
            assert_eq!(RelationFile::parse(name), expected, "{name}");
        }
    }

    #[test]
    fn other_names_are_no_relations() {
        for name in [
            "",
            "PG_VERSION",
            "pg_filenode.map",
            "pg_internal.init",
            "1259.",
            "1259.0",
            "1259.01",
            "01259",
            "1259_",
            "1259_foo",
            "t_1259",
            "t3",
            "t3_",
            "-1",
            "99999999999",
            "1259.1.2",
            "pgsql_tmp",
            "1259_fsm_vm",
            "template",
        ] {
            assert_eq!(RelationFile::parse(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_name_makes_it_panic(name: String) {
            let _ = RelationFile::parse(&name);
        }
    }
}
