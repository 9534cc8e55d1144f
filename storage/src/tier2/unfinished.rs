//! Unfinished multipart uploads, with the parts that the store has acknowledged and that need not be sent again.
//!
//! They are in memory only: after a crash none is continued, and the parts at the store are left to a lifecycle rule of
//! the bucket. Whoever takes an upload has it alone, and it is continued only for a file with the same size and
//! checksum. They are bounded in number and time; an upload that is given up is remembered until the store was told to
//! discard it. Only a process that asks for it keeps any ([`Unfinished::keep_up_to`]).

use super::Sha256Sum;
use object_store::{MultipartId, multipart::PartId, path::Path};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// After this time nobody is expected to continue it: its file is gone.
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);
/// Attempts in a row without a new part: the store may not be able to finish the upload at all.
const VAIN_MAX: u32 = 10;
/// Uploads that cannot be discarded now are retried later; beyond this number they are left to the lifecycle rule.
const GIVEN_UP_MAX: usize = 256;

/// An upload that was started at the store.
#[derive(Debug, Default)]
pub(super) struct Begun {
    pub(super) path: Path,
    pub(super) id: MultipartId,
    pub(super) size: u64,
    pub(super) sha256: Option<Sha256Sum>,
    pub(super) parts: BTreeMap<usize, Acknowledged>,
    vain: u32,
}

impl Begun {
    pub(super) fn new(path: Path, id: MultipartId, size: u64, sha256: Sha256Sum) -> Self {
        Self { path, id, size, sha256: Some(sha256), ..Self::default() }
    }
}

/// A part that the store has, and the checksum of the sent bytes.
#[derive(Debug, Clone)]
pub(super) struct Acknowledged {
    pub(super) id: PartId,
    pub(super) sha256: Sha256Sum,
}

/// Shared by all uploads of a store.
#[derive(Debug, Clone, Default)]
pub(super) struct Unfinished(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    keeps: usize,
    kept: BTreeMap<String, (Begun, Instant)>,
    given_up: Vec<(Path, MultipartId)>,
}

impl Unfinished {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps up to `number` uploads. For a process that will try again and ends in an orderly way.
    pub(super) fn keep_up_to(&self, number: usize) {
        self.lock().keeps = number;
    }

    /// Takes the upload that was started for exactly this file.
    pub(super) fn take(&self, key: &str, size: u64, sha256: Sha256Sum) -> Option<Begun> {
        self.take_at(key, size, sha256, Instant::now())
    }

    fn take_at(&self, key: &str, size: u64, sha256: Sha256Sum, now: Instant) -> Option<Begun> {
        let mut table = self.lock();
        let (begun, _) = table.kept.remove(key)?;
        table.forget_old(now);
        if begun.size == size && begun.sha256 == Some(sha256) {
            return Some(begun);
        }
        table.give_up(begun);
        None
    }

    fn keep(&self, key: &str, begun: Begun, now: Instant) {
        let mut table = self.lock();
        table.forget_old(now);
        if table.keeps == 0 || begun.parts.is_empty() || begun.vain >= VAIN_MAX {
            return table.give_up(begun);
        }
        if let Some((other, _)) = table.kept.insert(key.to_owned(), (begun, now)) {
            table.give_up(other);
        }
        while table.kept.len() > table.keeps {
            let oldest = table.kept.iter().min_by_key(|(_, (_, since))| *since);
            let Some(key) = oldest.map(|(key, _)| key.clone()) else { break };
            table.drop_kept(&key);
        }
    }

    /// The uploads that the store still has to discard; whoever takes them tells the store.
    pub(super) fn given_up(&self) -> Vec<(Path, MultipartId)> {
        std::mem::take(&mut self.lock().given_up)
    }

    /// Puts an upload back that the store could not be told about.
    pub(super) fn again(&self, path: Path, id: MultipartId) {
        self.lock().given_up.push((path, id));
    }

    /// Gives up all uploads; none are kept from now on.
    pub(super) fn give_up_all(&self) {
        let mut table = self.lock();
        table.keeps = 0;
        for (_, (begun, _)) in std::mem::take(&mut table.kept) {
            table.give_up(begun);
        }
    }
}

impl Table {
    fn give_up(&mut self, begun: Begun) {
        if self.given_up.len() == GIVEN_UP_MAX {
            let (path, _) = self.given_up.remove(0);
            tracing::warn!(key = %path, "an unfinished upload stays in the bucket; a lifecycle rule must remove it");
        }
        self.given_up.push((begun.path, begun.id));
    }

    fn drop_kept(&mut self, key: &str) {
        if let Some((begun, _)) = self.kept.remove(key) {
            self.give_up(begun);
        }
    }

    fn forget_old(&mut self, now: Instant) {
        let old = |since: &Instant| now.saturating_duration_since(*since) > KEPT_FOR;
        let keys = self.kept.iter().filter(|(_, (_, since))| old(since));
        for key in keys.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.drop_kept(&key);
        }
    }
}

/// An upload in progress. Dropping it before the end keeps it.
pub(super) struct Underway {
    of: Unfinished,
    key: String,
    pub(super) begun: Begun,
    parts_before: usize,
    ended: bool,
}

impl Underway {
    pub(super) fn new(of: Unfinished, key: &str, begun: Begun) -> Self {
        let parts_before = begun.parts.len();
        Self { of, key: key.to_owned(), begun, parts_before, ended: false }
    }

    /// The upload ended: the store has no parts of it any more, and perhaps the object.
    pub(super) fn ended(mut self) {
        self.ended = true;
    }

    /// Gives the upload up: nobody will continue it.
    pub(super) fn give_up(mut self) {
        self.ended = true;
        let begun = std::mem::take(&mut self.begun);
        self.of.lock().give_up(begun);
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let mut begun = std::mem::take(&mut self.begun);
        begun.vain = if begun.parts.len() > self.parts_before { 0 } else { begun.vain + 1 };
        self.of.keep(&self.key, begun, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM: Sha256Sum = Sha256Sum::new([1; 32]);

    fn begun(id: &str, parts: usize) -> Begun {
        let part = Acknowledged { id: PartId { content_id: "e".into() }, sha256: SUM };
        let parts = (0..parts).map(|n| (n, part.clone())).collect();
        Begun { id: id.into(), size: 9, sha256: Some(SUM), parts, ..Begun::default() }
    }

    fn keeping(number: usize) -> Unfinished {
        let unfinished = Unfinished::default();
        unfinished.keep_up_to(number);
        unfinished
    }

    fn given_up(unfinished: &Unfinished) -> Vec<String> {
        unfinished.given_up().into_iter().map(|(_, id)| id).collect()
    }

    #[test]
    fn only_the_same_file_takes_it_up_and_only_once() {
        let unfinished = keeping(4);
        drop(Underway::new(unfinished.clone(), "a", begun("1", 2)));
        assert_eq!(unfinished.take("b", 9, SUM).map(|b| b.id), None);
        assert_eq!(unfinished.take("a", 9, SUM).map(|b| b.id).as_deref(), Some("1"));
        assert_eq!(unfinished.take("a", 9, SUM).map(|b| b.id), None);
        for (size, sum) in [(8, SUM), (9, Sha256Sum::new([2; 32]))] {
            drop(Underway::new(unfinished.clone(), "a", begun("2", 2)));
            assert_eq!(unfinished.take("a", size, sum).map(|b| b.id), None);
            assert_eq!(given_up(&unfinished), ["2"]);
        }
    }

    #[test]
    fn it_is_bounded_in_number_in_time_and_in_vain_attempts() {
        let unfinished = keeping(2);
        let begin = Instant::now();
        let at = |hours: u64| begin + Duration::from_secs(3600 * hours);
        unfinished.keep("a", begun("a", 1), at(2));
        unfinished.keep("b", begun("b", 1), at(1));
        unfinished.keep("c", begun("c", 1), at(3));
        assert_eq!(given_up(&unfinished), ["b"], "the oldest");
        unfinished.keep("c", begun("c2", 1), at(3));
        assert_eq!(given_up(&unfinished), ["c"], "one for a key");
        unfinished.keep("d", begun("d", 0), at(3));
        assert_eq!(given_up(&unfinished), ["d"], "nothing of it was acknowledged");
        assert!(unfinished.take_at("c", 9, SUM, at(27)).is_some());
        assert_eq!(given_up(&unfinished), ["a"], "a day old");
        let mut found = begun("e", 1);
        for _ in 1..VAIN_MAX {
            drop(Underway::new(unfinished.clone(), "e", found));
            found = unfinished.take("e", 9, SUM).unwrap();
        }
        drop(Underway::new(unfinished.clone(), "e", found));
        assert_eq!(given_up(&unfinished), ["e"]);
    }

    #[test]
    fn a_process_that_does_not_come_again_keeps_nothing() {
        let unfinished = Unfinished::default();
        drop(Underway::new(unfinished.clone(), "a", begun("1", 2)));
        assert_eq!(given_up(&unfinished), ["1"]);
        unfinished.keep_up_to(4);
        drop(Underway::new(unfinished.clone(), "a", begun("2", 2)));
        unfinished.give_up_all();
        drop(Underway::new(unfinished.clone(), "a", begun("3", 2)));
        assert_eq!(given_up(&unfinished), ["2", "3"]);
    }
}
