//! OTLP over gRPC, by tonic and the official service definitions.

use super::{
    Answer, Arrival, Message, Signal,
    receiver::{Arrivals, keep},
};
use opentelemetry_proto::tonic::collector::{
    logs::v1::{
        ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
        logs_service_server::{LogsService, LogsServiceServer},
    },
    metrics::v1::{
        ExportMetricsPartialSuccess, ExportMetricsServiceRequest, ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    },
    trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
};
use std::io;
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tonic::{Code, Request, Response, Status, codec::CompressionEncoding};

#[derive(Clone)]
struct Service {
    answer: Answer,
    arrivals: Arrivals,
}

pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    answer: Answer,
    arrivals: Arrivals,
) {
    let service = Service { answer, arrivals };
    let gzip = CompressionEncoding::Gzip;
    let router = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(service.clone()).accept_compressed(gzip))
        .add_service(MetricsServiceServer::new(service.clone()).accept_compressed(gzip))
        .add_service(LogsServiceServer::new(service).accept_compressed(gzip));
    // It ends with the task only.
    let _ = match tls {
        None => {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            router.serve_with_incoming(incoming).await
        }
        Some(tls) => {
            let (ready, incoming) = mpsc::channel::<io::Result<_>>(8);
            let mut handshakes = JoinSet::new();
            handshakes.spawn(async move {
                let mut running = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    let (tls, ready) = (tls.clone(), ready.clone());
                    running.spawn(async move {
                        // A client that does not trust us is what some tests are about.
                        if let Ok(stream) = tls.accept(stream).await {
                            let _ = ready.send(Ok(stream)).await;
                        }
                    });
                }
            });
            let incoming = tokio_stream::wrappers::ReceiverStream::new(incoming);
            router.serve_with_incoming(incoming).await
        }
    };
}

impl Service {
    /// Notes the request and gives how many of its contents are refused.
    async fn take<T>(
        &self,
        signal: Signal,
        request: Request<T>,
        message: impl FnOnce(T) -> Message,
    ) -> Result<Option<i64>, Status> {
        let headers = request.metadata().clone().into_headers();
        let headers = headers
            .iter()
            .map(|(n, v)| (n.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned()))
            .collect();
        let path = request.extensions().get::<tonic::GrpcMethod<'_>>();
        let path = path.map(|m| m.service().to_owned()).unwrap_or_default();
        let message = message(request.into_inner());
        keep(&self.arrivals, Arrival { signal: Some(signal), path, headers, message });
        match self.answer {
            Answer::Status(code) => {
                Err(Status::new(Code::from_i32(i32::from(code)), "no, says the collector"))
            }
            Answer::Reject(count) => Ok(Some(count)),
            Answer::Slow(delay) => {
                tokio::time::sleep(delay).await;
                Ok(None)
            }
            _ => Ok(None),
        }
    }
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let rejected = self.take(Signal::Traces, request, Message::Traces).await?;
        let partial_success = rejected.map(|rejected_spans| ExportTracePartialSuccess {
            rejected_spans,
            error_message: "quota".into(),
        });
        Ok(Response::new(ExportTraceServiceResponse { partial_success }))
    }
}

#[tonic::async_trait]
impl MetricsService for Service {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let rejected = self.take(Signal::Metrics, request, Message::Metrics).await?;
        let partial_success = rejected.map(|rejected_data_points| ExportMetricsPartialSuccess {
            rejected_data_points,
            error_message: "quota".into(),
        });
        Ok(Response::new(ExportMetricsServiceResponse { partial_success }))
    }
}

#[tonic::async_trait]
impl LogsService for Service {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let rejected = self.take(Signal::Logs, request, Message::Logs).await?;
        let partial_success = rejected.map(|rejected_log_records| ExportLogsPartialSuccess {
            rejected_log_records,
            error_message: "quota".into(),
        });
        Ok(Response::new(ExportLogsServiceResponse { partial_success }))
    }
}
