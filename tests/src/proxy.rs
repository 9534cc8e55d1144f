//! The network between a client and a server, with its failures: connections that are cut, refused, or hang.
//!
//! A TCP proxy on loopback with a thread and a runtime of its own, so that a busy test does not slow it down.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weather {
    Fair,
    /// New connections are closed at once.
    Refused,
}

/// A proxy. Dropped, it is gone with all its connections.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    weather: Arc<Mutex<Weather>>,
    cuts: watch::Sender<u64>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// In front of a port on 127.0.0.1.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn new(to: u16) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listen on a free port");
        listener.set_nonblocking(true).expect("a socket for tokio");
        let port = listener.local_addr().expect("a bound socket").port();
        let weather = Arc::new(Mutex::new(Weather::Fair));
        let (cuts, cut) = watch::channel(0);
        let (end, ended) = oneshot::channel();
        let sky = Arc::clone(&weather);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime for the proxy");
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).expect("a listening socket");
                tokio::select! {
                    () = serve(listener, to, sky, cut) => {}
                    _ = ended => {}
                }
            });
        });
        Self { port, weather, cuts, end: Some(end), thread: Some(thread) }
    }

    /// Where clients connect to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cuts every connection; new ones are served.
    pub fn cut(&self) {
        self.cuts.send_modify(|n| *n += 1);
    }

    /// Cuts every connection and refuses new ones for this long.
    pub async fn outage(&self, length: Duration) {
        self.set(Weather::Refused);
        self.cut();
        tokio::time::sleep(length).await;
        self.set(Weather::Fair);
    }

    fn set(&self, weather: Weather) {
        *self.weather.lock().unwrap_or_else(PoisonError::into_inner) = weather;
    }
}

async fn serve(
    listener: TcpListener,
    to: u16,
    weather: Arc<Mutex<Weather>>,
    cut: watch::Receiver<u64>,
) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        while connections.try_join_next().is_some() {}
        if *weather.lock().unwrap_or_else(PoisonError::into_inner) == Weather::Refused {
            continue;
        }
        let mut cut = cut.clone();
        cut.mark_unchanged();
        connections.spawn(async move {
            tokio::select! {
                () = forward(client, to) => {}
                _ = cut.changed() => {}
            }
        });
    }
}

async fn forward(mut client: TcpStream, to: u16) {
    let Ok(mut server) = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], to))).await else {
        return;
    };
    // Its end, for whatever reason, is the end of both connections.
    let _ = copy_bidirectional(&mut client, &mut server).await;
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Proxy;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    #[tokio::test]
    async fn connections_are_forwarded_cut_and_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::new(listener.local_addr().unwrap().port());
        let connect = || {
            let client = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            client
        };
        let mut client = connect();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        proxy.cut();
        assert!(!matches!(client.read(&mut byte), Ok(1..)), "the connection is cut");
        proxy.set(super::Weather::Refused);
        let mut client = connect();
        assert!(!matches!(client.read(&mut byte), Ok(1..)), "refused");
    }
}
