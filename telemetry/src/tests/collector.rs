//! Collectors on loopback: OTLP over HTTP (plain or TLS), over gRPC, and two faulty ones.

use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceRequest,
    metrics::v1::ExportMetricsServiceRequest,
    trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
};
use prost::Message;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// One request as it was received.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Records what it receives. Stops when dropped.
pub(super) struct Collector {
    pub port: u16,
    received: Arc<Mutex<Vec<Request>>>,
    _tasks: JoinSet<()>,
}

impl Collector {
    pub(super) async fn http(tls: Option<TlsAcceptor>) -> Self {
        Self::answering_after(Duration::ZERO, tls).await
    }

    /// Over HTTP, with every answer delayed.
    pub(super) async fn slow(delay: Duration) -> Self {
        Self::answering_after(delay, None).await
    }

    async fn answering_after(delay: Duration, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let received = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&received);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, keep) = (tls.clone(), Arc::clone(&keep));
                connections.spawn(async move {
                    let served = match tls {
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => serve(stream, &keep, delay).await,
                            Err(error) => Err(error),
                        },
                        None => serve(stream, &keep, delay).await,
                    };
                    // The peer hanging up between requests is the normal end.
                    drop(served);
                });
            }
        });
        Self { port, received, _tasks: tasks }
    }

    pub(super) async fn grpc(tls: Option<tonic::transport::ServerTlsConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let received = Arc::new(Mutex::new(Vec::new()));
        let service = TraceServiceServer::new(Grpc(Arc::clone(&received)))
            .accept_compressed(tonic::codec::CompressionEncoding::Gzip);
        let mut server = tonic::transport::Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            server.add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { port, received, _tasks: tasks }
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.received.lock().unwrap().clone()
    }

    fn decoded<T: Message + Default>(&self, path: &str) -> Vec<T> {
        let wanted = self.requests().into_iter().filter(|r| r.path == path);
        wanted.map(|r| T::decode(r.body.as_slice()).unwrap()).collect()
    }
    pub(super) fn traces(&self) -> Vec<ExportTraceServiceRequest> {
        self.decoded("/v1/traces")
    }
    pub(super) fn metrics(&self) -> Vec<ExportMetricsServiceRequest> {
        self.decoded("/v1/metrics")
    }
    pub(super) fn logs(&self) -> Vec<ExportLogsServiceRequest> {
        self.decoded("/v1/logs")
    }
}

/// Just enough HTTP/1.1 for one client: requests with a length, one after the other.
async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    keep: &Mutex<Vec<Request>>,
    delay: Duration,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.lines();
        let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let headers: Vec<(String, String)> = lines
            .filter_map(|l| l.split_once(':'))
            .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()))
            .collect();
        let length = headers.iter().find(|(n, _)| n == "content-length");
        let mut body = vec![0; length.map_or(0, |(_, v)| v.parse().unwrap())];
        stream.read_exact(&mut body).await?;
        keep.lock().unwrap().push(Request { path, headers, body });
        tokio::time::sleep(delay).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
        stream.flush().await?;
    }
}

struct Grpc(Arc<Mutex<Vec<Request>>>);

#[tonic::async_trait]
impl TraceService for Grpc {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        let headers = headers
            .iter()
            .map(|(n, v)| (n.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()))
            .collect();
        let body = request.into_inner().encode_to_vec();
        self.0.lock().unwrap().push(Request { path: "/v1/traces".into(), headers, body });
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// A port on which nobody listens.
pub(super) async fn dead() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

/// Accepts connections and requests, and never answers.
pub(super) async fn hanging() -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    (port, tasks)
}
