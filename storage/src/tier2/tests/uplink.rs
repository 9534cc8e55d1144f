//! A slow, cut or stalled link to the store: a loopback proxy that passes a limited number of
//! bytes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpSocket, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::Mutex,
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// Read at a time. The socket buffer is hardly larger, so that a stalled link is visible to the
/// client.
const BLOCK: usize = 16 << 10;

/// The proxy; stops when dropped.
pub(super) struct Uplink {
    pub(super) endpoint: String,
    state: Arc<State>,
    _accept: JoinSet<()>,
}

struct State {
    /// Bytes per second, for all connections together.
    rate: AtomicU64,
    /// When the link is free again.
    free: Mutex<Instant>,
    /// Bytes sent to the store.
    sent: AtomicU64,
    /// At this number of bytes the connection is cut, once.
    cut_at: AtomicU64,
    /// At this number of bytes the link stalls.
    still_at: AtomicU64,
    still: AtomicBool,
}

impl Uplink {
    /// Starts a proxy in front of `http://host:port`.
    pub(super) fn new(to: &str, rate: u64) -> Self {
        let to = to.trim_start_matches("http://").to_owned();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(BLOCK as u32).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(64).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let never = || AtomicU64::new(u64::MAX);
        let state = Arc::new(State {
            rate: AtomicU64::new(rate),
            free: Mutex::new(Instant::now()),
            sent: AtomicU64::new(0),
            cut_at: never(),
            still_at: never(),
            still: AtomicBool::new(false),
        });
        let mut accept = JoinSet::new();
        accept.spawn(serve(listener, to, Arc::clone(&state)));
        Self { endpoint, state, _accept: accept }
    }

    pub(super) fn cut_at(&self, bytes: u64) {
        self.state.cut_at.store(bytes, Relaxed);
    }

    pub(super) fn still_at(&self, bytes: u64) {
        self.state.still_at.store(bytes, Relaxed);
    }

    /// New connections make progress again.
    pub(super) fn heal(&self) {
        self.still_at(u64::MAX);
        self.state.still.store(false, Relaxed);
    }

    pub(super) fn sent(&self) -> u64 {
        self.state.sent.load(Relaxed)
    }
}

async fn serve(listener: TcpListener, to: String, state: Arc<State>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let (to, state) = (to.clone(), Arc::clone(&state));
        connections.spawn(async move {
            let Ok(server) = TcpStream::connect(to).await else { return };
            let (from_client, mut to_client) = client.into_split();
            let (mut from_server, to_server) = server.into_split();
            tokio::select! {
                () = state.up(from_client, to_server) => {}
                _ = copy(&mut from_server, &mut to_client) => {}
            }
        });
    }
}

impl State {
    /// Runs until the client or the link ends it.
    async fn up(&self, mut client: OwnedReadHalf, mut server: OwnedWriteHalf) {
        let mut block = vec![0; BLOCK];
        loop {
            if self.still.load(Relaxed) {
                return std::future::pending().await;
            }
            let Ok(count @ 1..) = client.read(&mut block).await else { return };
            self.wait_for(count).await;
            let sent = self.sent.fetch_add(count as u64, Relaxed) + count as u64;
            if sent >= self.still_at.load(Relaxed) {
                self.still.store(true, Relaxed);
                continue;
            }
            let cut_at = self.cut_at.load(Relaxed);
            if sent >= cut_at && self.cut_at.swap(u64::MAX, Relaxed) != u64::MAX {
                return;
            }
            if server.write_all(&block[..count]).await.is_err() {
                return;
            }
        }
    }

    async fn wait_for(&self, bytes: usize) {
        let seconds = bytes as f64 / self.rate.load(Relaxed) as f64;
        let until = {
            let mut free = self.free.lock().await;
            *free = (*free).max(Instant::now()) + Duration::from_secs_f64(seconds);
            *free
        };
        sleep_until(until).await;
    }
}
