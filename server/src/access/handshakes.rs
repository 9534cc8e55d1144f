//! Connections whose handshake is not complete. Strangers can open them, so their number is limited, and they must not
//! keep others out.
//!
//! - Their number is limited per address (for IPv6 per /64) and in total. When there is one too many, a connection of
//!   the address with the most is closed: the one that is least far in the handshake, and among those the oldest. So
//!   strangers behind a client's address are closed before the client, because the client has sent more than they
//!   have.
//! - A connection that had sent data before it was closed, and was only not read yet, gets its place again.
//! - A connection with a complete handshake does not count here and is never closed by this module.
//! - Nobody waits for a place, so an honest client never queues behind strangers.
//! - Closed connections are logged now and then, by address.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

/// The limit per address. Sidecars behind one address that all return at once need only milliseconds each.
const OF_ADDRESS_MAX: usize = 64;
/// The limit in total. With the default limit of 1024 open files, most are left for clients.
const ALL_MAX: usize = 256;
/// How many connections that must be closed may have a last chance to send something. With the others this is half of
/// 1024 open files.
const LEAVING_MAX: usize = 256;
/// The time between two warnings.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// All connections in a handshake. Cheap to clone.
#[derive(Clone)]
pub struct Handshakes {
    state: Arc<Mutex<State>>,
    leaving: Arc<Semaphore>,
}

impl Default for Handshakes {
    fn default() -> Self {
        Self { state: Arc::default(), leaving: Arc::new(Semaphore::new(LEAVING_MAX)) }
    }
}

#[derive(Default)]
struct State {
    next: u64,
    /// In the order of arrival: the first is the oldest.
    open: BTreeMap<u64, Open>,
    /// The number of connections closed since the last warning, by address.
    closed: BTreeMap<IpAddr, u64>,
    told: Option<Instant>,
}

/// How far a handshake has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing was received.
    Silent,
    /// The first byte was received.
    Speaks,
    /// The greeting is complete.
    Greeted,
}

struct Open {
    address: IpAddr,
    stage: Stage,
    close: CancellationToken,
}

/// The place of a connection; dropping it frees the place.
pub struct Place {
    all: Handshakes,
    number: u64,
    address: IpAddr,
    close: CancellationToken,
}

impl Place {
    /// Waits until the place is needed for another one.
    pub async fn needed(&self) {
        self.close.cancelled().await;
    }

    /// A permit for a last chance when the place is needed; `None` when too many have one.
    pub fn leave(&self) -> Option<SemaphorePermit<'_>> {
        self.all.leaving.try_acquire().ok()
    }

    /// Records how far the handshake has come. A connection whose place was taken in the meantime gets one again.
    pub fn reached(&mut self, stage: Stage) {
        let mut state = self.all.lock();
        if let Some(open) = state.open.get_mut(&self.number) {
            open.stage = open.stage.max(stage);
            return;
        }
        state.make_room(self.address);
        if let Some(count) = state.closed.get_mut(&self.address) {
            *count = count.saturating_sub(1);
        }
        self.close = CancellationToken::new();
        let (address, close) = (self.address, self.close.clone());
        state.open.insert(self.number, Open { address, stage, close });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.lock().open.remove(&self.number);
    }
}

impl Handshakes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a connection from this address; another connection may be closed for it.
    pub fn enter(&self, address: IpAddr) -> Place {
        let address = network_of(address);
        let (number, close) = {
            let mut state = self.lock();
            state.make_room(address);
            let close = CancellationToken::new();
            let number = state.next;
            state.next += 1;
            let stage = Stage::Silent;
            state.open.insert(number, Open { address, stage, close: close.clone() });
            (number, close)
        };
        Place { all: self.clone(), number, address, close }
    }

    /// The numbers of closed connections by address, if it is time for a warning.
    pub fn to_tell(&self, now: Instant) -> Vec<(IpAddr, u64)> {
        let mut state = self.lock();
        let early = state.told.is_some_and(|told| now.duration_since(told) < TELL_EVERY);
        if early || state.closed.is_empty() {
            return Vec::new();
        }
        state.told = Some(now);
        std::mem::take(&mut state.closed).into_iter().filter(|(_, count)| *count > 0).collect()
    }
}

impl State {
    fn make_room(&mut self, comer: IpAddr) {
        let mut counts: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for open in self.open.values() {
            *counts.entry(open.address).or_default() += 1;
        }
        let own = counts.get(&comer).copied().unwrap_or(0);
        let victim = if own >= OF_ADDRESS_MAX {
            Some(comer)
        } else if self.open.len() >= ALL_MAX {
            counts.into_iter().max_by_key(|(_, count)| *count).map(|(address, _)| address)
        } else {
            None
        };
        let Some(address) = victim else { return };
        let of_it = self.open.iter().filter(|(_, open)| open.address == address);
        // The oldest of those that are least far.
        let least = of_it.min_by_key(|(number, open)| (open.stage, **number));
        let Some(number) = least.map(|(number, _)| *number) else { return };
        if let Some(open) = self.open.remove(&number) {
            open.close.cancel();
            // The size of this map is limited by the warnings, which empty it every minute, and by this check.
            if self.closed.len() < ALL_MAX || self.closed.contains_key(&address) {
                *self.closed.entry(address).or_default() += 1;
            }
        }
    }
}

/// Whoever has an IPv6 address usually controls the /64 around it.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let bits = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(bits))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn closed(places: &[Place]) -> usize {
        places.iter().filter(|place| place.close.is_cancelled()).count()
    }

    /// Regression test: 256 silent connections of one stranger kept everybody out.
    #[test]
    fn one_address_has_a_bound_and_its_oldest_silent_connection_goes() {
        let all = Handshakes::default();
        let client = all.enter(address(9));
        let mut speaking = all.enter(address(1));
        speaking.reached(Stage::Speaks);
        let silent: Vec<Place> = (0..300).map(|_| all.enter(address(1))).collect();
        assert!(!client.close.is_cancelled() && !speaking.close.is_cancelled());
        assert_eq!(closed(&silent), 300 - (OF_ADDRESS_MAX - 1));
        assert!(silent[0].close.is_cancelled() && !silent[299].close.is_cancelled());
        let late = all.enter(address(1));
        assert!(!late.close.is_cancelled(), "who comes last is let in");
        let now = Instant::now();
        assert_eq!(all.to_tell(now), [(address(1), 300 - 63 + 1)]);
        drop(all.enter(address(1)));
        assert!(all.to_tell(now).is_empty(), "said once in a minute");
    }

    #[test]
    fn many_addresses_do_not_keep_another_one_out() {
        let all = Handshakes::default();
        let strangers: Vec<Place> =
            (0..8).flat_map(|n| vec![n; 50]).map(|n| all.enter(address(n))).collect();
        let mut client = all.enter(address(99));
        client.reached(Stage::Speaks);
        let more: Vec<Place> = (100..200).map(|n| all.enter(address(n))).collect();
        assert!(!client.close.is_cancelled());
        assert!(more.iter().all(|place| !place.close.is_cancelled()));
        assert_eq!(closed(&strangers), 400 + 1 + 100 - ALL_MAX);
    }

    /// Behind NAT, strangers and a client have the same address.
    #[test]
    fn a_client_behind_the_strangers_address_is_the_last_to_go() {
        let all = Handshakes::default();
        let mut client = all.enter(address(1));
        let strangers: Vec<Place> = (0..300).map(|_| all.enter(address(1))).collect();
        assert!(client.close.is_cancelled(), "nobody had seen it speak");
        client.reached(Stage::Speaks);
        assert!(!client.close.is_cancelled(), "it had");
        assert!(all.lock().open.len() <= OF_ADDRESS_MAX);
        assert_eq!(all.to_tell(Instant::now()), [(address(1), 300 - 63 + 1 - 1)]);
        // Connections that send one byte and then nothing.
        client.reached(Stage::Greeted);
        let mut chatty: Vec<Place> = (0..300).map(|_| all.enter(address(1))).collect();
        chatty.iter_mut().for_each(|place| place.reached(Stage::Speaks));
        assert!(!client.close.is_cancelled());
        assert!(all.lock().open.len() <= OF_ADDRESS_MAX);
        drop((strangers, chatty));
        assert_eq!(all.lock().open.len(), 1);
    }

    #[test]
    fn a_place_is_given_back_and_an_ipv6_neighbourhood_is_one_address() {
        let all = Handshakes::default();
        for _ in 0..1000 {
            drop(all.enter(address(1)));
        }
        assert!(all.to_tell(Instant::now()).is_empty());
        let host = |n: u16| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, n]);
        let places: Vec<Place> = (0..100).map(|n| all.enter(host(n))).collect();
        assert_eq!(closed(&places), 100 - OF_ADDRESS_MAX);
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(network_of(mapped), address(1));
    }
}
