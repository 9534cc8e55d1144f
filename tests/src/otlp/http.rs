//! OTLP over HTTP/1.1.

use super::{
    Answer, Arrival, Message, Signal,
    receiver::{Arrivals, keep},
};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::{
    logs::v1::{ExportLogsPartialSuccess, ExportLogsServiceResponse},
    metrics::v1::{ExportMetricsPartialSuccess, ExportMetricsServiceResponse},
    trace::v1::{ExportTracePartialSuccess, ExportTraceServiceResponse},
};
use prost::Message as _;
use std::{convert::Infallible, io::Read};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    answer: Answer,
    arrivals: Arrivals,
) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, arrivals) = (tls.clone(), arrivals.clone());
        connections.spawn(async move {
            match tls {
                None => talk(stream, answer, arrivals).await,
                // A client that does not trust us is what some tests are about.
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        talk(stream, answer, arrivals).await;
                    }
                }
            }
        });
    }
}

async fn talk<S>(stream: S, answer: Answer, arrivals: Arrivals)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(|request| receive(request, answer, arrivals.clone()));
    let serving =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // The peer hanging up between requests is the normal end.
    let _ = serving.await;
}

async fn receive(
    request: Request<Incoming>,
    answer: Answer,
    arrivals: Arrivals,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return Ok(status(StatusCode::BAD_REQUEST)) };
    let body = body.to_bytes();
    let path = head.uri.path().to_owned();
    let headers: Vec<(String, String)> = head
        .headers
        .iter()
        .map(|(n, v)| (n.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()))
        .collect();
    let gzip = headers.iter().any(|(n, v)| n == "content-encoding" && v == "gzip");
    let (signal, message) = decode(&path, &plain(&body, gzip));
    keep(&arrivals, Arrival { signal, path, headers, message });
    if let Answer::Slow(delay) = answer {
        tokio::time::sleep(delay).await;
    }
    Ok(match answer {
        Answer::Status(code) => {
            status(StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR))
        }
        Answer::Page => {
            Response::new(Full::from("<!doctype html><title>It works!</title>".as_bytes()))
        }
        Answer::Reject(count) => Response::new(Full::from(rejection(signal, count))),
        _ => Response::new(Full::default()),
    })
}

fn status(code: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from("no".as_bytes()));
    *response.status_mut() = code;
    response
}

fn plain(body: &Bytes, gzip: bool) -> Vec<u8> {
    let mut plain = Vec::new();
    if gzip && flate2::read::GzDecoder::new(body.as_ref()).read_to_end(&mut plain).is_ok() {
        return plain;
    }
    body.to_vec()
}

/// By the content, where the path is a user's own.
fn decode(path: &str, body: &[u8]) -> (Option<Signal>, Message) {
    let traces = || prost::Message::decode(body).ok().map(Message::Traces);
    let metrics = || prost::Message::decode(body).ok().map(Message::Metrics);
    let logs = || prost::Message::decode(body).ok().map(Message::Logs);
    let (signal, message) = match path.rsplit('/').next() {
        Some("metrics") => (Signal::Metrics, metrics()),
        Some("logs") => (Signal::Logs, logs()),
        _ => (Signal::Traces, traces()),
    };
    (Some(signal), message.unwrap_or(Message::Undecodable(body.len())))
}

fn rejection(signal: Option<Signal>, count: i64) -> Vec<u8> {
    let error_message = "quota".to_owned();
    match signal {
        Some(Signal::Metrics) => ExportMetricsServiceResponse {
            partial_success: Some(ExportMetricsPartialSuccess {
                rejected_data_points: count,
                error_message,
            }),
        }
        .encode_to_vec(),
        Some(Signal::Logs) => ExportLogsServiceResponse {
            partial_success: Some(ExportLogsPartialSuccess {
                rejected_log_records: count,
                error_message,
            }),
        }
        .encode_to_vec(),
        _ => ExportTraceServiceResponse {
            partial_success: Some(ExportTracePartialSuccess {
                rejected_spans: count,
                error_message,
            }),
        }
        .encode_to_vec(),
    }
}
