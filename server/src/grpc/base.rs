//! The base-backup service: translates requests, calls the store, and translates the answers back.

use crate::{
    access::{
        auth::{Auth, permit},
        roles::Rpc,
    },
    base::{BaseStore, Caller, Lease, ListedBackup},
    maintenance::{Maintenance, Request as VerifyRequest, Step},
    quota::Quotas,
    receive::Comparer,
};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use klio_proto::{
    Code,
    base::{
        FileKind, FileName, GetFileRequest, OpenRepositoryRequest, Purpose, PutFile,
        ReserveRequest, document, percent, piece,
    },
    v1::{self, base_server::Base},
};
use klio_storage::layout::{BaseFile, BaseKind};
use serde::Serialize;
use std::{future::Future, pin::Pin, time::Duration};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

/// A client that sends nothing for this long is disconnected.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Shows a client that its reservation is alive. A broken connection is detected by TCP and HTTP/2.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How many progress steps may wait for a caller.
const STEPS_MAX: usize = 16;
/// The names in one message of a listing: far below the size limit of a message.
const LISTED_MAX: usize = 5_000;

#[derive(Clone)]
pub struct BaseService {
    pub auth: Auth,
    pub base: BaseStore,
    /// Knows which history a caller's PostgreSQL continues.
    pub comparer: Comparer,
    /// Runs maintenance and verification.
    pub maintenance: Maintenance,
    pub quotas: Quotas,
    /// Owns the tasks that send bytes.
    pub tasks: TaskTracker,
    /// Ends all reservations when the server stops.
    pub shutdown: CancellationToken,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

const fn kind_of(kind: FileKind) -> BaseKind {
    match kind {
        FileKind::Config => BaseKind::Config,
        FileKind::Key => BaseKind::Key,
        FileKind::Data => BaseKind::Data,
        FileKind::Index => BaseKind::Index,
        FileKind::Snapshot => BaseKind::Snapshot,
    }
}

fn file_of(name: &FileName) -> Result<BaseFile, Status> {
    if name.kind == FileKind::Config {
        return Ok(BaseFile::CONFIG);
    }
    let id = name.id.parse().map_err(|e| Code::Invalid.status(format!("read file name: {e}")))?;
    Ok(BaseFile { kind: kind_of(name.kind), id })
}

/// JSON for the wire, of types that JSON can represent.
fn json<T: Serialize>(what: &str, value: &T) -> Result<Bytes, Status> {
    let text = serde_json::to_vec(value);
    text.map(Bytes::from).map_err(|e| Code::Internal.status(format!("write {what}: {e}")))
}

fn entry(backup: &ListedBackup) -> Result<v1::BackupEntry, Status> {
    let optional =
        |value: Option<Result<Bytes, Status>>| value.transpose().map(Option::unwrap_or_default);
    Ok(v1::BackupEntry {
        record: json("a record", &backup.record)?,
        tier1: backup.tier1,
        tier2: backup.tier2,
        verified: optional(backup.verified.as_ref().map(|v| json("an outcome", v)))?,
        drilled: optional(backup.drilled.as_ref().map(|d| json("an outcome", d)))?,
    })
}

impl BaseService {
    /// The next message. Fails if the client sends nothing for [`SILENCE_MAX`], or if the server stops.
    async fn next<T>(&self, inbound: &mut Streaming<T>) -> Result<Option<T>, Status> {
        tokio::select! {
            message = inbound.message() => message,
            () = self.shutdown.cancelled() => {
                Err(Code::Unavailable.status("store a file: the server is stopping"))
            }
            () = tokio::time::sleep(SILENCE_MAX) => {
                let seconds = SILENCE_MAX.as_secs();
                let expected = format!("store a file: expected a first message, found the end of the stream within {seconds} s");
                Err(Code::Unavailable.status(expected))
            }
        }
    }
}

fn caller<T>(request: &Request<T>, name: String) -> Caller {
    Caller { name, address: request.remote_addr().map(|address| address.ip()) }
}

#[tonic::async_trait]
impl Base for BaseService {
    type GetFileStream = Answers<v1::GetFileResponse>;
    type ListFilesStream = Answers<v1::ListFilesResponse>;
    type ReserveStream = Answers<v1::ReserveResponse>;
    type VerifyStream = Answers<v1::VerifyResponse>;
    type MaintainStream = Answers<v1::MaintainResponse>;

    async fn open_repository(
        &self,
        request: Request<v1::OpenRepositoryRequest>,
    ) -> Result<Response<v1::OpenRepositoryResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::OpenRepository)?;
        let cluster = self.base.resolve(cluster).await?;
        let asked = OpenRepositoryRequest::try_from(request.into_inner())?;
        if let Some(system) = asked.system.filter(|_| asked.unproven) {
            self.comparer.may_be_unproven(&cluster, &system.system_identifier.to_string()).await?;
        }
        let secret = self.base.open_repository(&cluster, asked.system).await?;
        Ok(Response::new(v1::OpenRepositoryResponse {
            secret: json("a secret", &secret)?,
            compression_level: self.base.compression_level(),
        }))
    }

    async fn put_file(
        &self,
        request: Request<Streaming<v1::PutFileRequest>>,
    ) -> Result<Response<v1::PutFileResponse>, Status> {
        let identity = self.auth.identify(&request)?;
        let caller = caller(&request, identity.name.clone());
        let mut inbound = request.into_inner();
        let first = self.next(&mut inbound).await?;
        let first =
            first.ok_or_else(|| Code::Invalid.status("store a file: expected a message"))?;
        let named = permit(&identity, &first.cluster, Rpc::PutFile)?;
        let cluster = self.base.resolve_open(named).await?;
        let PutFile { name, size, data, .. } = PutFile::try_from(first)?;
        Span::current().record("bytes", size);
        let mut incoming = self.base.begin_put(&cluster, file_of(&name)?, size, &caller).await?;
        // A file that exists already uses no quota: it is a retry whose first answer was lost.
        let coming = match incoming.is_there() {
            true => None,
            false => Some(self.quotas.put(&self.base, &cluster, size).await?),
        };
        incoming.add(data).await?;
        while let Some(message) = self.next(&mut inbound).await? {
            incoming.add(piece(message.data)?).await?;
        }
        let existed = incoming.finish().await?;
        if let Some(coming) = coming {
            coming.stored();
        }
        Ok(Response::new(v1::PutFileResponse { existed }))
    }

    async fn get_file(
        &self,
        request: Request<v1::GetFileRequest>,
    ) -> Result<Response<Self::GetFileStream>, Status> {
        let (_, cluster) = self.auth.require(&request, &request.get_ref().cluster, Rpc::GetFile)?;
        let cluster = self.base.resolve(cluster).await?;
        let asked = GetFileRequest::try_from(request.into_inner())?;
        let file = file_of(&asked.name)?;
        let found = self.base.find_file(&cluster, file, asked.part).await?;
        let pieces = found.stream(&self.tasks);
        let answers = pieces.map(|piece| piece.map(|data| v1::GetFileResponse { data }));
        Ok(Response::new(answers.boxed()))
    }

    async fn list_files(
        &self,
        request: Request<v1::ListFilesRequest>,
    ) -> Result<Response<Self::ListFilesStream>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::ListFiles)?;
        let cluster = self.base.resolve(cluster).await?;
        let kind = kind_of(FileKind::read(request.get_ref().kind)?);
        let files = self.base.list_files(&cluster, kind).await?;
        let listed = files.into_iter().map(move |(file, size)| {
            let id = match kind {
                BaseKind::Config => String::new(),
                _ => file.id.to_string(),
            };
            v1::ListedFile { id, size }
        });
        let answers = stream::iter(listed)
            .chunks(LISTED_MAX)
            .map(|files| Ok(v1::ListFilesResponse { files }));
        Ok(Response::new(answers.boxed()))
    }

    async fn reserve(
        &self,
        request: Request<v1::ReserveRequest>,
    ) -> Result<Response<Self::ReserveStream>, Status> {
        let identity = self.auth.identify(&request)?;
        let named = permit(&identity, &request.get_ref().cluster, Rpc::Reserve)?;
        let cluster = self.base.resolve(named).await?;
        let caller = caller(&request, identity.name.clone());
        let asked = ReserveRequest::try_from(request.into_inner())?;
        let lease = match asked.purpose {
            Purpose::Backup(name) => {
                self.base.reserve_backup(&cluster, name.as_deref(), false, caller).await?
            }
            Purpose::Resumed(name) => {
                self.base.reserve_backup(&cluster, Some(&name), true, caller).await?
            }
            Purpose::Restore(backup) => {
                let running = self.base.reservations().restores_of(&cluster);
                self.quotas.restore(&cluster, running)?;
                self.base.reserve_restore(&cluster, backup.as_deref()).await
            }
        };
        let auth = self.auth.clone();
        let check = move || auth.recheck(&identity);
        Ok(Response::new(heartbeats(lease, self.shutdown.clone(), check).boxed()))
    }

    async fn commit_backup(
        &self,
        request: Request<v1::CommitBackupRequest>,
    ) -> Result<Response<v1::CommitBackupResponse>, Status> {
        let (identity, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::CommitBackup)?;
        let cluster = self.base.resolve_open(cluster).await?;
        let caller = caller(&request, identity.name);
        let asked = request.into_inner();
        let record = document("record", asked.record)?;
        self.comparer.may_commit(&cluster, &asked.writer_id, &record).await?;
        self.base.commit(&cluster, &record, &caller).await?;
        Ok(Response::new(v1::CommitBackupResponse {}))
    }

    async fn list_backups(
        &self,
        request: Request<v1::ListBackupsRequest>,
    ) -> Result<Response<v1::ListBackupsResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::ListBackups)?;
        let cluster = self.base.resolve(cluster).await?;
        let found = self.base.backups(&cluster).await?;
        let backups = found.backups.iter().map(entry).collect::<Result<_, _>>()?;
        // A listing reports the same problems of the WAL as `klio status`.
        let problems = [found.problems, self.base.wal().problems(&cluster)].concat();
        Ok(Response::new(v1::ListBackupsResponse { backups, problems }))
    }

    async fn holdings(
        &self,
        request: Request<v1::HoldingsRequest>,
    ) -> Result<Response<v1::HoldingsResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::Holdings)?;
        let cluster = self.base.resolve(cluster).await?;
        let holdings = self.base.holdings_known(&cluster).await?;
        Ok(Response::new(v1::HoldingsResponse { holdings: json("holdings", &holdings)? }))
    }

    async fn verify(
        &self,
        request: Request<v1::VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let (_, cluster) = self.auth.require(&request, &request.get_ref().cluster, Rpc::Verify)?;
        let cluster = self.base.resolve(cluster).await?;
        let asked = request.into_inner();
        let read_percent = percent("read_percent", asked.read_percent)?;
        let backup = match asked.backup_name.as_str() {
            "" => None,
            name => {
                let name = name.parse();
                Some(name.map_err(|e| Code::Invalid.status(format!("read request: {e}")))?)
            }
        };
        let wanted = VerifyRequest { backup, read_percent, wal: asked.wal };
        let maintenance = self.maintenance.clone();
        let answers = self.follow(
            move |steps| async move {
                let outcome = maintenance.verify(&cluster, &wanted, &teller(steps)).await?;
                json("an outcome", &outcome)
            },
            |found| v1::VerifyResponse {
                kind: Some(match found {
                    Found::Step(step) => v1::verify_response::Kind::Progress(progress(step)),
                    Found::Outcome(outcome) => v1::verify_response::Kind::Outcome(outcome),
                }),
            },
        );
        Ok(Response::new(answers))
    }

    async fn maintain(
        &self,
        request: Request<v1::MaintainRequest>,
    ) -> Result<Response<Self::MaintainStream>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::Maintain)?;
        let cluster = self.base.resolve(cluster).await?;
        let maintenance = self.maintenance.clone();
        let answers = self.follow(
            move |steps| async move {
                let outcome = maintenance.apply(&cluster, &teller(steps)).await?;
                json("an outcome", &outcome)
            },
            |found| v1::MaintainResponse {
                kind: Some(match found {
                    Found::Step(step) => v1::maintain_response::Kind::Progress(progress(step)),
                    Found::Outcome(outcome) => v1::maintain_response::Kind::Outcome(outcome),
                }),
            },
        );
        Ok(Response::new(answers))
    }

    async fn plan_retention(
        &self,
        request: Request<v1::PlanRetentionRequest>,
    ) -> Result<Response<v1::PlanRetentionResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::PlanRetention)?;
        let cluster = self.base.resolve(cluster).await?;
        let plan = self.maintenance.plan(&cluster).await?;
        Ok(Response::new(v1::PlanRetentionResponse { plan: json("a plan", &plan)? }))
    }

    async fn record_drill(
        &self,
        request: Request<v1::RecordDrillRequest>,
    ) -> Result<Response<v1::RecordDrillResponse>, Status> {
        let (_, cluster) =
            self.auth.require(&request, &request.get_ref().cluster, Rpc::RecordDrill)?;
        let cluster = self.base.resolve(cluster).await?;
        let outcome = document("outcome", request.into_inner().outcome)?;
        self.maintenance.record_drill(&cluster, &outcome).await?;
        Ok(Response::new(v1::RecordDrillResponse {}))
    }
}

/// What long work sends to the caller.
enum Found {
    Step(Step),
    Outcome(Bytes),
}

fn progress(step: Step) -> v1::Progress {
    let Step { phase, done_bytes, total_bytes, done_files, total_files } = step;
    v1::Progress { phase, done_bytes, total_bytes, done_files, total_files }
}

/// A step is dropped if the channel is full, because another one follows.
fn teller(steps: mpsc::Sender<Step>) -> impl Fn(Step) + Send + Sync {
    move |step| drop(steps.try_send(step))
}

impl BaseService {
    /// Runs work for as long as the caller is connected and the server runs, and sends its steps and then its result.
    /// The work has a task of its own and never waits for the caller: a caller that does not read receives fewer
    /// steps, and holds nothing up (P13).
    fn follow<T, W>(
        &self,
        work: impl FnOnce(mpsc::Sender<Step>) -> W,
        answer: impl Fn(Found) -> T + Send + 'static,
    ) -> Answers<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<Bytes, Status>> + Send + 'static,
    {
        let (sender, steps) = mpsc::channel(STEPS_MAX);
        let (tell, done) = oneshot::channel();
        let (work, shutdown, left) =
            (work(sender), self.shutdown.clone(), CancellationToken::new());
        // Moves into the answer, and ends the work when the caller is gone.
        let here = left.clone().drop_guard();
        let work = async move {
            let done = tokio::select! {
                done = work => done,
                () = left.cancelled() => return,
                () = shutdown.cancelled() => Err(Code::Unavailable.status("the server is stopping")),
            };
            // The caller may be gone.
            drop(tell.send(done));
        };
        self.tasks.spawn(work.in_current_span());
        // The work owns the sender, so the steps end when the work does.
        let steps = ReceiverStream::new(steps).map(|step| Ok(Found::Step(step)));
        let last = async move {
            let done = done.await;
            drop(here);
            let died = |_| Err(Code::Internal.status("the work ended without a result"));
            done.unwrap_or_else(died).map(Found::Outcome)
        };
        let all = steps.chain(stream::once(last));
        all.map(move |found| found.map(&answer)).boxed()
    }
}

/// Sends the name at once, and then a heartbeat every few seconds. The lease lives as long as the stream.
fn heartbeats(
    lease: Lease,
    shutdown: CancellationToken,
    check: impl Fn() -> Result<(), Status> + Send + 'static,
) -> impl Stream<Item = Result<v1::ReserveResponse, Status>> + Send {
    let ticks = tokio::time::interval(HEARTBEAT);
    stream::unfold(Some((lease, ticks, shutdown, check)), |state| async {
        let (lease, mut ticks, shutdown, check) = state?;
        tokio::select! {
            () = shutdown.cancelled() => {
                return Some((Err(Code::Unavailable.status("the server is stopping")), None));
            }
            _ = ticks.tick() => {}
        }
        if let Err(expired) = check() {
            return Some((Err(expired), None));
        }
        let backup_name = lease.backup().map(ToString::to_string).unwrap_or_default();
        let alive = v1::ReserveResponse { backup_name };
        Some((Ok(alive), Some((lease, ticks, shutdown, check))))
    })
}
