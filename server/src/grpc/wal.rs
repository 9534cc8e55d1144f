//! The WAL service: translates, calls, translates back.

use super::{
    auth::{Auth, permit},
    fetch,
    roles::Rpc,
};
use crate::{
    fetch::Source,
    queue,
    receive::{Receiver, open::blocking},
};
use futures::{Stream, StreamExt};
use klio_proto::{
    Code,
    v1::{self, receive_request, wal_server::Wal},
    wal::{Open, PositionRequest, PutHistoryRequest},
};
use klio_storage::layout::WalFile;
use std::{pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

/// A client that opens a stream and says nothing is let go after this.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// Acknowledgements waiting for the network. A client that does not read them stalls only itself.
const RESPONSES_MAX: usize = 16;

/// The service.
#[derive(Clone)]
pub struct WalService {
    /// Who may do what.
    pub auth: Auth,
    /// Makes sessions.
    pub receiver: Receiver,
    /// Reads both tiers.
    pub source: Source,
    /// Gets jobs for history files.
    pub queue: queue::Publisher,
    /// Owns the sessions.
    pub tasks: TaskTracker,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Wal for WalService {
    type ReceiveStream = Answers<v1::ReceiveResponse>;
    type FetchStream = Answers<v1::FetchResponse>;

    async fn position(
        &self,
        request: Request<v1::PositionRequest>,
    ) -> Result<Response<v1::PositionResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::Position)?;
        let asked = PositionRequest::try_from(request.into_inner())?;
        // Refuses another system before the sidecar goes any further; writes nothing at first contact.
        self.receiver.base.check_system(&cluster, asked.system).await?;
        let timelines = self.receiver.store.positions(&cluster).into_iter();
        let timelines = timelines
            .map(|p| v1::TimelinePosition {
                timeline: p.timeline.get(),
                start_lsn: p.start.as_u64(),
                flushed_lsn: p.flushed.as_u64(),
                has_history: p.has_history,
            })
            .collect();
        Ok(Response::new(v1::PositionResponse { timelines }))
    }

    async fn put_history(
        &self,
        request: Request<v1::PutHistoryRequest>,
    ) -> Result<Response<v1::PutHistoryResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::PutHistory)?;
        let PutHistoryRequest { system, timeline, content, .. } =
            PutHistoryRequest::try_from(request.into_inner())?;
        let (store, name) = (self.receiver.store.clone(), cluster.clone());
        // First contact may be with a cluster that was promoted long ago: its history comes before its WAL.
        self.receiver.base.pin(&cluster, system).await?;
        let size = content.len() as u64;
        let new = store.history(&cluster, timeline).is_err();
        blocking(move || store.put_history(&name, timeline, &content)).await?;
        if new {
            self.receiver.metrics.written(&cluster, size);
            self.queue.publish_path(&cluster, WalFile::History(timeline), size);
        }
        Ok(Response::new(v1::PutHistoryResponse {}))
    }

    async fn receive(
        &self,
        request: Request<Streaming<v1::ReceiveRequest>>,
    ) -> Result<Response<Self::ReceiveStream>, Status> {
        let identity = self.auth.identify(&request)?;
        let peer = request.remote_addr().map_or_else(|| "?".into(), |a| a.to_string());
        let who = format!("{} from {peer}", identity.name);
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(OPEN_TIMEOUT, inbound.message());
        let first = first.await.map_err(|_| {
            Code::Invalid.status(format!(
                "open stream: expected an open message within {} s",
                OPEN_TIMEOUT.as_secs()
            ))
        })??;
        let Some(receive_request::Kind::Open(open)) = first.and_then(|m| m.kind) else {
            return Err(Code::Invalid.status("open stream: expected an open message first"));
        };
        let cluster = permit(&identity, &open.cluster, Rpc::Receive)?;
        let open = Open::try_from(open)?;
        let (responses, outbound) = mpsc::channel(RESPONSES_MAX);
        let receiver = self.receiver.clone();
        let session = receiver.serve(identity, cluster, open, who, inbound, responses);
        self.tasks.spawn(self.receiver.metrics.polls().watch(session).in_current_span());
        Ok(Response::new(ReceiverStream::new(outbound).boxed()))
    }

    async fn fetch(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let (_, cluster) = self.auth.require(&request, &request.get_ref().cluster, Rpc::Fetch)?;
        let file: WalFile = request
            .get_ref()
            .name
            .parse()
            .map_err(|e| Code::Invalid.status(format!("fetch WAL: {e}")))?;
        let found = if request.get_ref().tier2_only {
            self.source.find_other_copy(&cluster, file).await?
        } else {
            self.source.find(&cluster, file).await?
        };
        Ok(Response::new(fetch::stream(found, &self.tasks)))
    }
}
