//! Files that the parent has unchanged are not read again, and files that may have changed are.

use super::*;
use crate::repository::YOUNG;

#[test]
fn an_unchanged_file_is_not_read_again_and_a_changed_one_is() {
    let home = home();
    let tree = Fake::new().file("data/a", &noise(1, 40_000)).file("data/b", &noise(2, 40_000));
    let (_, first) = back_up(&home.repository, &tree, None, "one");
    assert_eq!(tree.opened().len(), 2);

    let (part, second) = back_up(&home.repository, &tree, Some(&first), "two");
    assert_eq!((part.files_unchanged, part.added_bytes), (2, 0));
    assert!(tree.opened().is_empty());
    assert_eq!(second.parent, Some(first.id));

    let later = long_ago() + Duration::from_nanos(1);
    let tree = tree.changed("data/b", Content::File(noise(3, 40_000)), later);
    let (part, third) = back_up(&home.repository, &tree, Some(&second), "three");
    assert_eq!(part.files_unchanged, 1);
    assert_eq!(tree.opened(), [Path::new("data/b")]);
    assert!(restored(&home.repository, &third).unwrap() == tree.expected());
}

#[test]
fn only_a_new_ctime_is_a_change_too() {
    struct Touched(Fake);
    impl Source for Touched {
        fn listing_began(&self) -> SystemTime {
            self.0.began
        }
        fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
            Box::new(self.0.entries().map(|entry| {
                let mut entry = entry?;
                entry.ctime += Duration::from_nanos(1);
                Ok(entry)
            }))
        }
    }
    let home = home();
    let tree = Fake::new().file("data/a", b"a");
    let (_, first) = back_up(&home.repository, &tree, None, "one");
    tree.opened();
    let touched = Touched(tree);
    let part = home.repository.snapshot(&touched, Some(&first.id), Arc::new(Silent)).unwrap();
    assert_eq!(part.files_unchanged, 0);
    assert_eq!(touched.0.opened().len(), 1);
}

/// PostgreSQL may write a page again within the same tick of the clock that stamped the first
/// write.
#[test]
fn a_file_changed_less_than_two_seconds_before_the_listing_is_read_again_next_time() {
    let home = home();
    let second = Duration::from_secs(1);
    for (age, read_again) in
        [(YOUNG + second, false), (YOUNG - Duration::from_nanos(1), true), (second, true)]
    {
        let when = began() - age;
        let tree = Fake::new().changed("data/a", Content::File(noise(1, 20_000)), when);
        let (_, first) = back_up(&home.repository, &tree, None, "one");
        tree.opened();
        // The same size and times, other bytes: written again within the same tick.
        let tree = tree.changed("data/a", Content::File(noise(2, 20_000)), when);
        let mut next = tree.clone();
        next.began += Duration::from_secs(3600);
        let (_, summary) = back_up(&home.repository, &next, Some(&first), "two");
        assert_eq!(!next.opened().is_empty(), read_again, "{age:?}");
        let whole = restored(&home.repository, &summary).unwrap() == next.expected();
        assert_eq!(whole, read_again, "{age:?}");
        // By now the file has been unchanged long enough, so the third backup trusts the second.
        next.began += Duration::from_secs(3600);
        back_up(&home.repository, &next, Some(&summary), "three");
        assert!(next.opened().is_empty());
    }
}

/// A clock that went backwards makes files with times in the future: they are young in every
/// backup.
#[test]
fn a_file_from_the_future_is_read_in_every_backup() {
    let home = home();
    let when = began() + Duration::from_secs(86_400);
    let tree = Fake::new().changed("data/a", Content::File(noise(1, 20_000)), when);
    let (_, first) = back_up(&home.repository, &tree, None, "one");
    let mut next = tree.clone();
    next.began += Duration::from_secs(60);
    tree.opened();
    back_up(&home.repository, &next, Some(&first), "two");
    assert_eq!(next.opened().len(), 1);
}

/// Two backups at the same time, according to their clock.
#[test]
fn a_young_file_is_read_again_also_when_the_clock_stands_still() {
    let home = home();
    let tree = Fake::new().changed("data/a", Content::File(noise(1, 20_000)), began());
    let (_, first) = back_up(&home.repository, &tree, None, "one");
    tree.opened();
    let tree = tree.changed("data/a", Content::File(noise(2, 20_000)), began());
    let (_, second) = back_up(&home.repository, &tree, Some(&first), "two");
    assert_eq!(tree.opened().len(), 1);
    assert!(restored(&home.repository, &second).unwrap() == tree.expected());
}

#[test]
fn a_parent_that_is_gone_is_no_parent() {
    let home = home();
    let tree = Fake::new().file("data/a", &noise(1, 20_000));
    let (_, first) = back_up(&home.repository, &tree, None, "one");
    home.repository.forget(&[first.id]).unwrap();
    tree.opened();
    let (part, second) = back_up(&home.repository, &tree, Some(&first), "two");
    assert_eq!((part.files_unchanged, second.parent), (0, None));
    assert!(restored(&home.repository, &second).unwrap() == tree.expected());
}
