//! A simulated disk that loses data, for tests that crash anywhere and check what survived.
//!
//! The model is meant to be at least as unkind as Linux with ext4 without a journal:
//!
//! - A file has the content that programs see (`cache`) and the content on the medium (`disk`). Each unsynced sector of
//!   512 bytes survives a power loss or not, independently; so does the length.
//! - Unsynced sectors may reach the medium at any time before that (write-back), so mixtures of several writes occur.
//! - A name that was created, renamed or removed and not synced survives or not, independently: after a rename both
//!   names may exist, or neither.
//! - A failed sync leaves some of the sectors unwritten and marks them clean. They stay readable, or are dropped from
//!   the cache, and the next sync succeeds without having written them ("fsyncgate", 2018).
//! - Only if a test asks for it, the medium fails silently: a successful sync leaves a sector unchanged or writes it to
//!   another place in the file; a file cannot be read; a bit is flipped.
//! - The used space is the sum of all lengths plus one block per file; a write beyond the capacity writes a part and
//!   fails.
//!
//! Deterministic: the same seed and the same calls give the same disk. Used only in tests, also by other crates.

use super::{Disk, DiskFile, DiskLock, Entry, FileHandle, SECTOR_BYTES, Stat};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

const SECTOR: usize = SECTOR_BYTES as usize;
/// The space that a file takes besides its content.
const FILE_COST: u64 = 4096;
const ROOT: u64 = 0;
const EIO: i32 = 5;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// The process dies; the cache stays, including whatever a failed sync left in it.
    Kill,
    /// The machine loses power; only what reached the medium survives.
    PowerLoss,
}

/// A simulated disk; clones share it.
#[derive(Debug, Clone)]
pub struct SimDisk(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct FileNode {
    cache: Vec<u8>,
    disk: Vec<u8>,
    /// One flag for each sector of `cache`: its content is not on the medium yet.
    dirty: Vec<bool>,
    modified: u64,
}

#[derive(Debug, Default)]
struct DirNode {
    cache: BTreeMap<String, u64>,
    disk: BTreeMap<String, u64>,
    /// Unsynced changes in order: a name, and the node that it refers to now.
    pending: Vec<(String, Option<u64>)>,
}

#[derive(Debug)]
enum Node {
    File(FileNode),
    Dir(DirNode),
}

#[derive(Debug)]
struct Inner {
    random: u64,
    nodes: BTreeMap<u64, Node>,
    next_node: u64,
    /// Handles from earlier runs of the program are invalid.
    epoch: u64,
    operations: u64,
    writes: u64,
    syncs: u64,
    crash_at: Option<u64>,
    fail_sync_at: BTreeSet<u64>,
    fail_write_at: BTreeSet<u64>,
    lies_at: BTreeMap<u64, Lie>,
    /// Unreadable files, with the error number that reading returns.
    unreadable: BTreeMap<u64, i32>,
    capacity: Option<u64>,
    crashed: bool,
    locked: BTreeSet<u64>,
    interruptions: BTreeMap<PathBuf, Interruption>,
}

/// An action of a test in the middle of another change.
struct Interruption(Box<dyn FnOnce() + Send>);

impl fmt::Debug for Interruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interruption")
    }
}

/// How a sync fails silently.
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// A sector keeps its old content on the medium.
    Lost,
    /// A sector is written to another place in the file.
    Misdirected,
}

fn power_is_off() -> io::Error {
    io::Error::other("simulated crash: the machine is off")
}

impl Inner {
    /// The splitmix64 generator.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.random().is_multiple_of(n)
    }

    /// Counts a change. Returns true for the change at which the crash happens, which may still be partly done.
    fn step(&mut self) -> io::Result<bool> {
        if self.crashed {
            return Err(power_is_off());
        }
        let due = self.crash_at.is_some_and(|at| self.operations >= at);
        self.operations += 1;
        self.crashed = due;
        Ok(due)
    }

    fn alive(&self) -> io::Result<()> {
        if self.crashed { Err(power_is_off()) } else { Ok(()) }
    }

    fn dir(&mut self, node: u64) -> io::Result<&mut DirNode> {
        match self.nodes.get_mut(&node) {
            Some(Node::Dir(dir)) => Ok(dir),
            Some(Node::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn file(&mut self, node: u64) -> io::Result<&mut FileNode> {
        match self.nodes.get_mut(&node) {
            Some(Node::File(file)) => Ok(file),
            Some(Node::Dir(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn find(&mut self, path: &Path) -> io::Result<u64> {
        let mut node = ROOT;
        for part in path.components() {
            if let Component::Normal(name) = part {
                let name = name.to_string_lossy();
                let found = self.dir(node)?.cache.get(name.as_ref()).copied();
                node = found.ok_or(io::ErrorKind::NotFound)?;
            }
        }
        Ok(node)
    }

    fn place(&mut self, path: &Path) -> io::Result<(u64, String)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = self.find(path.parent().unwrap_or(Path::new("/")))?;
        Ok((parent, name.to_string_lossy().into_owned()))
    }

    fn set(&mut self, parent: u64, name: &str, to: Option<u64>) -> io::Result<()> {
        let dir = self.dir(parent)?;
        match to {
            Some(node) => dir.cache.insert(name.to_owned(), node),
            None => dir.cache.remove(name),
        };
        dir.pending.push((name.to_owned(), to));
        Ok(())
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<u64> {
        self.step()?;
        let (parent, name) = self.place(path)?;
        if self.dir(parent)?.cache.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if self.free() < FILE_COST {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let number = self.next_node;
        self.next_node += 1;
        self.nodes.insert(number, node);
        self.set(parent, &name, Some(number))?;
        self.alive()?;
        Ok(number)
    }

    fn reachable(&self) -> BTreeSet<u64> {
        let mut found = BTreeSet::from([ROOT]);
        let mut todo = vec![ROOT];
        while let Some(node) = todo.pop() {
            if let Some(Node::Dir(dir)) = self.nodes.get(&node) {
                todo.extend(dir.cache.values().copied().filter(|n| found.insert(*n)));
            }
        }
        found
    }

    fn free(&self) -> u64 {
        let Some(capacity) = self.capacity else { return u64::MAX };
        let cost = |node| match self.nodes.get(&node) {
            Some(Node::File(file)) => file.cache.len() as u64 + FILE_COST,
            _ => FILE_COST,
        };
        capacity.saturating_sub(self.reachable().into_iter().map(cost).sum())
    }

    fn write(&mut self, node: u64, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = bytes;
        let mut outcome = Ok(());
        if self.step()? {
            let part = self.random() as usize % (bytes.len() + 1);
            bytes = &bytes[..part];
            outcome = Err(power_is_off());
        }
        self.writes += 1;
        let number = self.writes;
        if self.fail_write_at.remove(&number) {
            let part = self.random() as usize % (bytes.len() + 1);
            bytes = &bytes[..part];
            outcome = Err(io::Error::from_raw_os_error(5));
        }
        let length = self.file(node)?.cache.len() as u64;
        let grows = (offset + bytes.len() as u64).saturating_sub(length);
        if self.capacity.is_some() && grows > 0 {
            let short = grows.saturating_sub(self.free()) as usize;
            if short > 0 {
                bytes = &bytes[..bytes.len().saturating_sub(short)];
                outcome = Err(io::ErrorKind::StorageFull.into());
            }
        }
        let now = self.operations;
        let file = self.file(node)?;
        file.write(bytes, offset as usize, now);
        if self.one_in(8) {
            self.write_back(node)?;
        }
        outcome
    }

    /// Writes some unsynced sectors to the medium early.
    fn write_back(&mut self, node: u64) -> io::Result<()> {
        let chance = 1 + self.random() % 4;
        for sector in self.file(node)?.dirty_sectors() {
            if self.one_in(chance) {
                self.file(node)?.store(sector);
            }
        }
        Ok(())
    }

    fn sync_fails(&mut self) -> bool {
        self.syncs += 1;
        let number = self.syncs;
        self.fail_sync_at.remove(&number)
    }

    fn sync_file(&mut self, node: u64) -> io::Result<()> {
        if self.step()? {
            self.write_back(node)?;
            return Err(power_is_off());
        }
        let fails = self.sync_fails();
        if let Some(lie) = self.lies_at.remove(&self.syncs) {
            self.lie(node, lie)?;
        }
        let evict = self.one_in(2);
        let keep_one_in = 1 + self.random() % 3;
        for sector in self.file(node)?.dirty_sectors() {
            if fails && !self.one_in(keep_one_in) {
                self.file(node)?.forget(sector, evict);
            } else {
                self.file(node)?.store(sector);
            }
        }
        if fails {
            return Err(io::Error::from_raw_os_error(5));
        }
        let file = self.file(node)?;
        let length = file.cache.len();
        file.disk.resize(length, 0);
        Ok(())
    }

    /// Silently corrupts one of the sectors that are about to be synced.
    fn lie(&mut self, node: u64, lie: Lie) -> io::Result<()> {
        let dirty = self.file(node)?.dirty_sectors();
        if dirty.is_empty() {
            return Ok(());
        }
        let sector = dirty[self.random() as usize % dirty.len()];
        let luck = self.random() as usize;
        let file = self.file(node)?;
        let moved = file.cache[file.range(sector)].to_vec();
        file.forget(sector, true);
        if let Lie::Misdirected = lie {
            let to = luck % file.dirty.len();
            let range = file.range(to);
            let count = range.len().min(moved.len());
            file.write(&moved[..count], range.start, 0);
            file.store(to);
        }
        Ok(())
    }

    fn sync_dir(&mut self, node: u64) -> io::Result<()> {
        let crashes = self.step()?;
        let fails = self.sync_fails();
        let mut lost = BTreeSet::new();
        for (name, to) in std::mem::take(&mut self.dir(node)?.pending) {
            if (!fails && !crashes) || (!lost.contains(&name) && self.one_in(2)) {
                self.dir(node)?.store(name, to);
                continue;
            }
            lost.insert(name.clone());
            if crashes {
                // It is not lost yet: the machine may keep running without the program.
                self.dir(node)?.pending.push((name, to));
            }
        }
        match (crashes, fails) {
            (true, _) => Err(power_is_off()),
            (_, true) => Err(io::Error::from_raw_os_error(5)),
            _ => Ok(()),
        }
    }

    /// Decides what survives: nothing unsynced, all of it, or a mixture.
    fn lose_power(&mut self) {
        let mode = self.random() % 4;
        let survives = |inner: &mut Self| match mode {
            0 => false,
            1 => true,
            _ => inner.one_in(2),
        };
        for number in self.nodes.keys().copied().collect::<Vec<_>>() {
            let Some(mut node) = self.nodes.remove(&number) else { continue };
            match &mut node {
                Node::File(file) => {
                    for sector in file.dirty_sectors() {
                        if survives(self) {
                            file.store(sector);
                        }
                    }
                    if file.disk.len() != file.cache.len() && survives(self) {
                        file.disk.resize(file.cache.len(), 0);
                    }
                    file.cache = file.disk.clone();
                    file.dirty = vec![false; file.cache.len().div_ceil(SECTOR)];
                }
                Node::Dir(dir) => {
                    // Changes of one name survive in order; changes of different names are independent.
                    let mut lost = BTreeSet::new();
                    for (name, to) in std::mem::take(&mut dir.pending) {
                        if lost.contains(&name) || !survives(self) {
                            lost.insert(name);
                        } else {
                            dir.store(name, to);
                        }
                    }
                    dir.cache = dir.disk.clone();
                }
            }
            self.nodes.insert(number, node);
        }
        let keep = self.reachable();
        self.nodes.retain(|number, _| keep.contains(number));
        let there: BTreeSet<u64> = self.nodes.keys().copied().collect();
        for node in self.nodes.values_mut() {
            if let Node::Dir(dir) = node {
                dir.cache.retain(|_, n| there.contains(n));
                dir.disk.retain(|_, n| there.contains(n));
            }
        }
    }
}

impl FileNode {
    fn write(&mut self, bytes: &[u8], offset: usize, now: u64) {
        let end = offset + bytes.len();
        if bytes.is_empty() {
            return;
        }
        if self.cache.len() < end {
            // Not `resize`, which in a debug build loops over every byte.
            self.cache.extend_from_slice(&vec![0; end - self.cache.len()]);
            self.dirty.resize(end.div_ceil(SECTOR), false);
        }
        self.cache[offset..end].copy_from_slice(bytes);
        self.dirty[offset / SECTOR..end.div_ceil(SECTOR)].fill(true);
        self.modified = now;
    }

    fn dirty_sectors(&self) -> Vec<usize> {
        (0..self.dirty.len()).filter(|n| self.dirty[*n]).collect()
    }

    fn range(&self, sector: usize) -> std::ops::Range<usize> {
        sector * SECTOR..((sector + 1) * SECTOR).min(self.cache.len())
    }

    fn store(&mut self, sector: usize) {
        let range = self.range(sector);
        if self.disk.len() < range.end {
            self.disk.extend_from_slice(&vec![0; range.end - self.disk.len()]);
        }
        self.disk[range.clone()].copy_from_slice(&self.cache[range]);
        self.dirty[sector] = false;
    }

    /// The sync failed for this sector: it is marked clean, and its content may be dropped from the cache.
    fn forget(&mut self, sector: usize, evict: bool) {
        self.dirty[sector] = false;
        if evict {
            for at in self.range(sector) {
                self.cache[at] = self.disk.get(at).copied().unwrap_or(0);
            }
        }
    }
}

impl DirNode {
    fn store(&mut self, name: String, to: Option<u64>) {
        match to {
            Some(node) => self.disk.insert(name, node),
            None => self.disk.remove(&name),
        };
    }
}

impl SimDisk {
    /// An empty disk; `seed` determines its random choices.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            random: seed,
            nodes: BTreeMap::from([(ROOT, Node::Dir(DirNode::default()))]),
            next_node: 1,
            epoch: 0,
            operations: 0,
            writes: 0,
            syncs: 0,
            crash_at: None,
            fail_sync_at: BTreeSet::new(),
            fail_write_at: BTreeSet::new(),
            lies_at: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            capacity: None,
            crashed: false,
            locked: BTreeSet::new(),
            interruptions: BTreeMap::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of changes so far (writes, syncs, names).
    pub fn operations(&self) -> u64 {
        self.inner().operations
    }

    /// Number of file writes and syncs (of files and directories) so far.
    pub fn writes_and_syncs(&self) -> (u64, u64) {
        let inner = self.inner();
        (inner.writes, inner.syncs)
    }

    /// Crashes in the middle of the change after the next `n`.
    pub fn crash_after(&self, n: u64) {
        let mut inner = self.inner();
        inner.crash_at = Some(inner.operations + n);
    }

    /// True after the crash: every call fails until [`SimDisk::restart`].
    pub fn crashed(&self) -> bool {
        self.inner().crashed
    }

    /// Fails the sync (of a file or directory) after the next `n`.
    pub fn fail_sync_after(&self, n: u64) {
        let mut inner = self.inner();
        let at = inner.syncs + n + 1;
        inner.fail_sync_at.insert(at);
    }

    /// Fails the file write after the next `n`; a part of it is written.
    pub fn fail_write_after(&self, n: u64) {
        let mut inner = self.inner();
        let at = inner.writes + n + 1;
        inner.fail_write_at.insert(at);
    }

    /// The sync after the next `n` leaves a sector unchanged on the medium, but reports success.
    pub fn lose_in_sync_after(&self, n: u64) {
        let mut inner = self.inner();
        let at = inner.syncs + n + 1;
        inner.lies_at.insert(at, Lie::Lost);
    }

    /// The sync after the next `n` writes a sector to another place in the file, but reports success.
    pub fn misdirect_in_sync_after(&self, n: u64) {
        let mut inner = self.inner();
        let at = inner.syncs + n + 1;
        inner.lies_at.insert(at, Lie::Misdirected);
    }

    /// Makes every read of a file fail from now on, like a bad sector does.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn fail_reads(&self, path: &Path) -> io::Result<()> {
        self.fail_reads_with(path, EIO)
    }

    /// The same with another error number of the operating system.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn fail_reads_with(&self, path: &Path, code: i32) -> io::Result<()> {
        let mut inner = self.inner();
        let node = inner.find(path)?;
        inner.unreadable.insert(node, code);
        Ok(())
    }

    /// Runs `then` once, just before the name `path` is created or removed. The disk is not locked meanwhile, so `then`
    /// sees what another thread would see at that moment.
    pub fn before_name_changes(&self, path: &Path, then: impl FnOnce() + Send + 'static) {
        self.inner().interruptions.insert(path.to_owned(), Interruption(Box::new(then)));
    }

    fn interrupt(&self, path: &Path) {
        let planned = self.inner().interruptions.remove(path);
        if let Some(Interruption(then)) = planned {
            then();
        }
    }

    /// Cancels planned faults and makes files readable again; a planned crash stays.
    pub fn clear_faults(&self) {
        let mut inner = self.inner();
        inner.lies_at.clear();
        inner.unreadable.clear();
        inner.fail_sync_at.clear();
        inner.fail_write_at.clear();
    }

    /// Sets the capacity in bytes; `None` for unlimited.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.inner().capacity = bytes;
    }

    /// Bytes in use: passing this to [`SimDisk::set_capacity`] leaves no free space.
    pub fn used(&self) -> u64 {
        let mut inner = self.inner();
        let before = inner.capacity.replace(u64::MAX);
        let used = u64::MAX - inner.free();
        inner.capacity = before;
        used
    }

    /// Inverts one bit of a file on the medium and in the cache.
    ///
    /// # Errors
    /// When there is no such byte.
    pub fn flip_bit(&self, path: &Path, byte: u64, bit: u8) -> io::Result<()> {
        let mut inner = self.inner();
        let node = inner.find(path)?;
        let file = inner.file(node)?;
        for content in [&mut file.cache, &mut file.disk] {
            *content.get_mut(byte as usize).ok_or(io::ErrorKind::UnexpectedEof)? ^= 1 << (bit % 8);
        }
        Ok(())
    }

    /// Ends the program and starts the machine again: existing handles and locks become invalid, and planned faults and
    /// crashes are cancelled.
    pub fn restart(&self, how: Restart) {
        let mut inner = self.inner();
        if how == Restart::PowerLoss {
            inner.lose_power();
        }
        inner.crashed = false;
        inner.crash_at = None;
        drop(inner);
        self.restart_program();
    }

    /// Ends the program and starts it again, as [`Restart::Kill`], but keeps a planned crash.
    pub fn restart_program(&self) {
        let mut inner = self.inner();
        inner.epoch += 1;
        inner.fail_sync_at.clear();
        inner.fail_write_at.clear();
        inner.locked.clear();
    }

    fn handle(&self, node: u64, epoch: u64) -> FileHandle {
        Arc::new(SimFile { disk: self.clone(), node, epoch })
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    node: u64,
    epoch: u64,
}

impl SimFile {
    fn inner(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.disk.inner();
        inner.alive()?;
        if inner.epoch == self.epoch { Ok(inner) } else { Err(power_is_off()) }
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut inner = self.inner()?;
        if let Some(code) = inner.unreadable.get(&self.node) {
            return Err(io::Error::from_raw_os_error(*code));
        }
        let content = &inner.file(self.node)?.cache;
        let from = (offset as usize).min(content.len());
        let count = buf.len().min(content.len() - from);
        buf[..count].copy_from_slice(&content[from..from + count]);
        Ok(count)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.inner()?.write(self.node, bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.inner()?.sync_file(self.node)
    }
    fn sync_all(&self) -> io::Result<()> {
        self.inner()?.sync_file(self.node)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.inner()?.file(self.node)?.cache.len() as u64)
    }
}

#[derive(Debug)]
struct SimLock {
    disk: SimDisk,
    node: u64,
    epoch: u64,
}

impl DiskLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut inner = self.disk.inner();
        if inner.epoch == self.epoch {
            inner.locked.remove(&self.node);
        }
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, _write: bool) -> io::Result<FileHandle> {
        let mut inner = self.inner();
        inner.alive()?;
        let node = inner.find(path)?;
        inner.file(node)?;
        Ok(self.handle(node, inner.epoch))
    }

    fn create_new(&self, path: &Path) -> io::Result<FileHandle> {
        let mut inner = self.inner();
        let node = inner.add(path, Node::File(FileNode::default()))?;
        Ok(self.handle(node, inner.epoch))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.interrupt(from);
        self.interrupt(to);
        let mut inner = self.inner();
        inner.step()?;
        let node = inner.find(from)?;
        let (from_dir, from_name) = inner.place(from)?;
        let (to_dir, to_name) = inner.place(to)?;
        inner.set(to_dir, &to_name, Some(node))?;
        inner.set(from_dir, &from_name, None)?;
        inner.alive()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.interrupt(path);
        let mut inner = self.inner();
        inner.step()?;
        let node = inner.find(path)?;
        inner.file(node)?;
        let (parent, name) = inner.place(path)?;
        inner.set(parent, &name, None)?;
        inner.alive()
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.inner().add(path, Node::Dir(DirNode::default())).map(|_| ())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.step()?;
        let node = inner.find(path)?;
        if !inner.dir(node)?.cache.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let (parent, name) = inner.place(path)?;
        inner.set(parent, &name, None)?;
        inner.alive()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.inner();
        inner.alive()?;
        let node = inner.find(path)?;
        inner.sync_dir(node)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut inner = self.inner();
        inner.alive()?;
        let node = inner.find(path)?;
        let names = inner.dir(node)?.cache.clone();
        let entry = |(name, node)| {
            let is_dir = matches!(inner.nodes.get(&node), Some(Node::Dir(_)));
            Entry { name, is_dir }
        };
        Ok(names.into_iter().map(entry).collect())
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let mut inner = self.inner();
        inner.alive()?;
        let node = inner.find(path)?;
        let file = inner.file(node)?;
        Ok(Stat { size: file.cache.len() as u64, modified_unix: file.modified as f64 })
    }

    fn set_modified(&self, path: &Path, unix: f64) -> io::Result<()> {
        let mut inner = self.inner();
        inner.alive()?;
        let node = inner.find(path)?;
        inner.file(node)?.modified = unix as u64;
        Ok(())
    }

    fn space(&self, _path: &Path) -> io::Result<(u64, u64)> {
        let inner = self.inner();
        inner.alive()?;
        Ok((inner.free(), inner.capacity.unwrap_or(u64::MAX)))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        let mut inner = self.inner();
        inner.alive()?;
        let node = match inner.find(path) {
            Ok(node) => node,
            Err(_) => inner.add(path, Node::File(FileNode::default()))?,
        };
        if !inner.locked.insert(node) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(SimLock { disk: self.clone(), node, epoch: inner.epoch }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_writes(seed: u64) -> SimDisk {
        let disk = SimDisk::new(seed);
        let file = disk.create_new(Path::new("/f")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        file.write_all_at(&[1; 2048], 0).unwrap();
        file.sync_data().unwrap();
        file.write_all_at(&[2; 2048], 1024).unwrap();
        disk
    }

    fn content(disk: &SimDisk) -> Vec<u8> {
        super::super::read_small(disk, Path::new("/f"), 1 << 20).unwrap()
    }

    #[test]
    fn the_same_seed_gives_the_same_disk() {
        for seed in 0..20 {
            let [a, b] = [two_writes(seed), two_writes(seed)];
            a.restart(Restart::PowerLoss);
            b.restart(Restart::PowerLoss);
            assert_eq!(content(&a), content(&b));
        }
    }

    #[test]
    fn synced_bytes_stay_and_unsynced_ones_may_be_torn() {
        let mut outcomes = BTreeSet::new();
        for seed in 0..200 {
            let disk = two_writes(seed);
            disk.restart(Restart::PowerLoss);
            let found = content(&disk);
            assert_eq!(found[..1024], [1; 1024]);
            outcomes.insert(found);
        }
        assert!(outcomes.len() > 5, "{}", outcomes.len());
    }

    #[test]
    fn after_a_failed_sync_the_next_one_succeeds_without_having_written() {
        let lost = (0..50).any(|seed| {
            let disk = two_writes(seed);
            let file = disk.open(Path::new("/f"), true).unwrap();
            disk.fail_sync_after(0);
            assert!(file.sync_data().is_err());
            assert!(file.sync_data().is_ok());
            let seen = content(&disk);
            disk.restart(Restart::PowerLoss);
            seen[1024..] == [2; 2048] && content(&disk) != seen
        });
        assert!(lost);
    }

    #[test]
    fn names_that_were_not_synced_may_be_lost_in_any_order() {
        let mut outcomes = BTreeSet::new();
        for seed in 0..100 {
            let disk = SimDisk::new(seed);
            disk.create_new(Path::new("/a")).unwrap();
            disk.sync_dir(Path::new("/")).unwrap();
            disk.rename(Path::new("/a"), Path::new("/b")).unwrap();
            disk.restart(Restart::PowerLoss);
            let there = |name: &str| disk.stat(Path::new(name)).is_ok();
            outcomes.insert((there("/a"), there("/b")));
        }
        assert_eq!(outcomes.len(), 4);
    }

    #[test]
    fn a_full_disk_takes_a_part_and_a_kill_keeps_the_cache() {
        let disk = SimDisk::new(1);
        let file = disk.create_new(Path::new("/f")).unwrap();
        disk.set_capacity(Some(disk.used() + 1000));
        let error = file.write_all_at(&[7; 1500], 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        disk.restart(Restart::Kill);
        assert_eq!(content(&disk), [7; 1000]);
        assert!(file.size().is_err(), "a handle of the ended program must be dead");
    }
}
