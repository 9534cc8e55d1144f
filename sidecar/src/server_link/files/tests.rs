//! Repository files over a real gRPC connection to an in-memory server that fails as instructed.

use super::*;
use crate::config;
use klio_proto::v1::base_server::{Base, BaseServer};
use std::{
    collections::BTreeMap,
    pin::Pin,
    time::{Duration, Instant},
};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Streaming};

fn file(bytes: &[u8]) -> BaseFile {
    BaseFile { kind: BaseKind::Data, id: Sha256Sum::of(bytes) }
}

#[test]
fn a_file_is_cut_into_messages_without_losing_or_copying_a_byte() {
    let parts =
        [Bytes::from(vec![1; PIECE_BYTES_MAX * 2 + 7]), Bytes::from(vec![2; 3]), Bytes::new()];
    let messages = messages("c".into(), file(b"x"), &parts);
    assert_eq!(messages[0].size as usize, PIECE_BYTES_MAX * 2 + 10);
    assert_eq!((messages[0].cluster.as_str(), messages[0].data.len()), ("c", 0));
    let sizes: Vec<usize> = messages.iter().skip(1).map(|m| m.data.len()).collect();
    assert_eq!(sizes, [PIECE_BYTES_MAX, PIECE_BYTES_MAX, 7, 3]);
    assert!(messages.iter().skip(1).all(|m| m.cluster.is_empty() && m.name.is_none()));
    assert_eq!(messages[1].data.as_ptr(), parts[0].as_ptr());
}

#[test]
fn the_config_has_no_name() {
    assert_eq!(wire_name(BaseFile::CONFIG).id, "");
    assert_eq!(listed_file(BaseKind::Config, "").unwrap(), BaseFile::CONFIG);
    assert!(listed_file(BaseKind::Data, "../x").is_err());
}

#[derive(Debug, Default)]
struct Script {
    files: BTreeMap<String, Vec<u8>>,
    /// Answers to the next calls; when empty, they succeed.
    fail: Vec<Code>,
    /// Ranges are returned shorter than requested by this many bytes.
    short_by: u64,
    calls: usize,
    largest_message: usize,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Fake {
    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }
    fn call(&self) -> Result<(), Status> {
        let mut script = self.script();
        script.calls += 1;
        match script.fail.pop() {
            None => Ok(()),
            Some(code) => Err(code.status("as told")),
        }
    }
}

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not here"))
}

#[tonic::async_trait]
impl Base for Fake {
    type GetFileStream = Answers<v1::GetFileResponse>;
    type ListFilesStream = Answers<v1::ListFilesResponse>;
    type ReserveStream = Answers<v1::ReserveResponse>;
    type VerifyStream = Answers<v1::VerifyResponse>;
    type MaintainStream = Answers<v1::MaintainResponse>;

    async fn put_file(
        &self,
        request: Request<Streaming<v1::PutFileRequest>>,
    ) -> Result<Response<v1::PutFileResponse>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.expect("a first message");
        let name = first.name.expect("a name").id;
        self.call()?;
        let mut bytes = first.data.to_vec();
        while let Some(message) = messages.message().await? {
            let largest = &mut self.script().largest_message;
            *largest = (*largest).max(message.data.len());
            bytes.extend_from_slice(&message.data);
        }
        assert_eq!(bytes.len() as u64, first.size);
        let existed = self.script().files.insert(name, bytes).is_some();
        Ok(Response::new(v1::PutFileResponse { existed }))
    }

    async fn get_file(
        &self,
        request: Request<v1::GetFileRequest>,
    ) -> Result<Response<Self::GetFileStream>, Status> {
        self.call()?;
        let request = request.into_inner();
        let script = self.script();
        let bytes = script.files.get(&request.name.expect("a name").id);
        let bytes = bytes.ok_or_else(|| Code::NotFound.status("no such file"))?;
        let part = |offset: u64, length: u64| {
            let from = offset as usize;
            let length = match length {
                0 => bytes.len() - from,
                length => (length - script.short_by) as usize,
            };
            &bytes[from..from + length]
        };
        let asked = match request.ranges.as_slice() {
            [] => part(request.offset, request.length).to_vec(),
            ranges => ranges.iter().flat_map(|r| part(r.offset, r.length)).copied().collect(),
        };
        let pieces = asked.chunks(1000);
        let answers: Vec<_> = pieces
            .map(|data| Ok(v1::GetFileResponse { data: Bytes::copy_from_slice(data) }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn list_files(
        &self,
        _: Request<v1::ListFilesRequest>,
    ) -> Result<Response<Self::ListFilesStream>, Status> {
        self.call()?;
        let script = self.script();
        let listed = |(id, bytes): (&String, &Vec<u8>)| {
            let files = vec![v1::ListedFile { id: id.clone(), size: bytes.len() as u64 }];
            Ok(v1::ListFilesResponse { files })
        };
        let answers: Vec<_> = script.files.iter().map(listed).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn open_repository(
        &self,
        _: Request<v1::OpenRepositoryRequest>,
    ) -> Result<Response<v1::OpenRepositoryResponse>, Status> {
        no()
    }
    async fn reserve(
        &self,
        _: Request<v1::ReserveRequest>,
    ) -> Result<Response<Self::ReserveStream>, Status> {
        no()
    }
    async fn commit_backup(
        &self,
        _: Request<v1::CommitBackupRequest>,
    ) -> Result<Response<v1::CommitBackupResponse>, Status> {
        no()
    }
    async fn list_backups(
        &self,
        _: Request<v1::ListBackupsRequest>,
    ) -> Result<Response<v1::ListBackupsResponse>, Status> {
        no()
    }
    async fn holdings(
        &self,
        _: Request<v1::HoldingsRequest>,
    ) -> Result<Response<v1::HoldingsResponse>, Status> {
        no()
    }
    async fn verify(
        &self,
        _: Request<v1::VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        no()
    }
    async fn maintain(
        &self,
        _: Request<v1::MaintainRequest>,
    ) -> Result<Response<Self::MaintainStream>, Status> {
        no()
    }
    async fn plan_retention(
        &self,
        _: Request<v1::PlanRetentionRequest>,
    ) -> Result<Response<v1::PlanRetentionResponse>, Status> {
        no()
    }
    async fn record_drill(
        &self,
        _: Request<v1::RecordDrillRequest>,
    ) -> Result<Response<v1::RecordDrillResponse>, Status> {
        no()
    }
}

struct Setup {
    fake: Fake,
    files: GrpcFiles,
    stop: CancellationToken,
    _server: AbortOnDropHandle<()>,
}

async fn setup() -> Setup {
    let fake = Fake::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let service = BaseServer::new(fake.clone());
    let serve = async move {
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
    };
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(serve);
    let server = async move { while tasks.join_next().await.is_some() {} };
    let server = AbortOnDropHandle::new(tokio::runtime::Handle::current().spawn(server));
    let settings = config::Server { address, unsafe_plaintext: true, ..config::Server::default() };
    let stop = CancellationToken::new();
    let link = ServerLink::new(&settings).unwrap();
    let files = GrpcFiles::new(link, "main".parse().unwrap(), Handle::current(), stop.clone());
    Setup { fake, files, stop, _server: server }
}

/// Runs blocking work off the runtime's thread, as every caller of `Files` must.
async fn beside<T: Send + 'static>(
    setup: &Setup,
    work: impl FnOnce(&GrpcFiles) -> T + Send + 'static,
) -> T {
    let files = setup.files.clone();
    tokio::task::spawn_blocking(move || work(&files)).await.unwrap()
}

#[tokio::test]
async fn what_is_written_is_read_back_whole_and_in_ranges() {
    let setup = setup().await;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n >> 3) as u8).collect();
    let name = file(&bytes);
    let expected = bytes.clone();
    beside(&setup, move |files| {
        let (one, two) = bytes.split_at(1_234_567);
        let parts = [Bytes::copy_from_slice(one), Bytes::copy_from_slice(two)];
        files.write(name, &parts).unwrap();
        assert!(files.read(name).unwrap() == expected);
        assert!(files.read_range(name, 999, 5000).unwrap() == expected[999..5999]);
        assert!(files.read_range(name, 7, 0).unwrap().is_empty());
        let ranges = [2_000_000..2_100_000, 5..6, 0..3];
        let found = files.read_ranges(name, &ranges).unwrap();
        assert_eq!(
            found,
            ranges.map(|r| Bytes::copy_from_slice(&expected[r.start as usize..r.end as usize]))
        );
        assert_eq!(files.list(BaseKind::Data).unwrap(), [(name, 3_000_000)]);
    })
    .await;
    assert_eq!(setup.fake.script().largest_message, PIECE_BYTES_MAX);
}

#[tokio::test]
async fn what_can_pass_is_tried_again_and_what_cannot_is_not() {
    let setup = setup().await;
    setup.fake.script().fail = vec![Code::Unavailable, Code::StorageFailed, Code::DiskFull];
    let name = file(b"abc");
    beside(&setup, move |f| f.write(name, &[Bytes::from_static(b"abc")]).unwrap()).await;
    assert_eq!(setup.fake.script().calls, 4);
    setup.fake.script().fail = vec![Code::Forbidden];
    let error = beside(&setup, move |f| f.read(name).unwrap_err()).await;
    assert_eq!(error.kind, Kind::Denied, "{error}");
    assert_eq!(setup.fake.script().calls, 5);
    let failure = setup.files.failure().unwrap();
    assert!(!failure.hint.is_empty() && failure.message.contains(&name.relative()), "{failure}");
}

#[tokio::test]
async fn absence_is_definitive_and_a_short_range_is_damage() {
    let setup = setup().await;
    let error = beside(&setup, |f| f.read(file(b"none")).unwrap_err()).await;
    assert_eq!(error.kind, Kind::NotFound);
    let name = file(b"abcdef");
    beside(&setup, move |f| f.write(name, &[Bytes::from_static(b"abcdef")]).unwrap()).await;
    setup.fake.script().short_by = 1;
    let error = beside(&setup, move |f| f.read_range(name, 1, 4).unwrap_err()).await;
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    let error = beside(&setup, move |f| f.read_ranges(name, &[4..6, 0..2]).unwrap_err()).await;
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    let error = beside(&setup, move |f| f.remove(name).unwrap_err()).await;
    assert_eq!(error.kind, Kind::Denied);
}

#[tokio::test]
async fn a_stop_ends_calls_that_are_being_tried_again() {
    let setup = setup().await;
    setup.fake.script().fail = vec![Code::Unavailable; 1000];
    let begun = Instant::now();
    let stop = setup.stop.clone();
    let waiting = beside(&setup, |f| f.read(file(b"x")).unwrap_err());
    let stopper = async {
        while setup.fake.script().calls < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
    };
    let (error, ()) = tokio::join!(waiting, stopper);
    assert_eq!(error.kind, Kind::Transient);
    assert!(begun.elapsed() < Duration::from_secs(30));
    let error = beside(&setup, |f| f.list(BaseKind::Data).unwrap_err()).await;
    assert!(error.to_string().contains("stopped"), "{error}");
}
