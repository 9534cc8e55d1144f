//! Every call of klio.v1 against every role, on the real server: what the table of docs/access.md says is what happens (P8,
//! P13). The calls are made of the compiled descriptors, so that one which is added and forgotten here fails.

use klio_proto::{Code, v1::FILE_DESCRIPTOR_SET};
use klio_tests::{
    bundle, client, install_crypto,
    pki::{Authority, Validity},
    programs,
    site::{PATIENCE, Site},
    wait::eventually,
};
use prost::{
    Message,
    bytes::{Buf, BufMut},
};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

/// The callers: the cluster's own tenant, another cluster's, and those who have no cluster.
const CALLERS: [&str; 5] = ["tenant", "stranger", "observer", "operator", "admin"];

/// Who is let in, by call; nobody else is. Written down here once more, by what each role is for.
const ALLOWED: &[(&str, &[&str])] = &[
    ("Wal/Position", &["tenant"]),
    ("Wal/PutHistory", &["tenant"]),
    ("Wal/Compare", &["tenant"]),
    ("Wal/Refill", &["tenant"]),
    ("Wal/BeginGeneration", &["tenant"]),
    ("Wal/Receive", &["tenant"]),
    ("Wal/Fetch", &["tenant", "admin"]),
    ("Base/OpenRepository", &["tenant"]),
    ("Base/PutFile", &["tenant"]),
    ("Base/GetFile", &["tenant", "admin"]),
    ("Base/ListFiles", &["tenant", "admin"]),
    ("Base/Reserve", &["tenant"]),
    ("Base/CommitBackup", &["tenant"]),
    ("Base/ListBackups", &["tenant", "observer", "operator", "admin"]),
    ("Base/Holdings", &["tenant", "observer", "operator", "admin"]),
    ("Base/Verify", &["tenant", "operator", "admin"]),
    ("Base/Maintain", &["tenant", "operator", "admin"]),
    ("Base/PlanRetention", &["tenant", "observer", "operator", "admin"]),
    ("Base/RecordDrill", &["tenant", "operator", "admin"]),
    ("Catalog/ListGenerations", &["tenant", "observer", "operator", "admin"]),
    ("Catalog/DecideGeneration", &["operator", "admin"]),
    ("Catalog/Status", &["tenant", "observer", "operator", "admin"]),
    ("Catalog/ListWal", &["tenant", "observer", "operator", "admin"]),
    ("Catalog/Check", &["tenant", "observer", "operator", "admin"]),
    ("Catalog/Timelines", &["tenant", "observer", "operator", "admin"]),
    ("Catalog/DecideTimeline", &["operator", "admin"]),
];

/// What is needed of `google.protobuf.FileDescriptorSet`.
#[derive(Clone, PartialEq, Message)]
struct Descriptors {
    #[prost(message, repeated, tag = "1")]
    files: Vec<File>,
}

#[derive(Clone, PartialEq, Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "6")]
    services: Vec<Service>,
}

#[derive(Clone, PartialEq, Message)]
struct Service {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    methods: Vec<Method>,
}

#[derive(Clone, PartialEq, Message)]
struct Method {
    #[prost(string, tag = "1")]
    name: String,
}

/// `Service/Method` of everything in klio.v1.
fn calls() -> BTreeSet<String> {
    let set = Descriptors::decode(FILE_DESCRIPTOR_SET).expect("descriptors");
    let files = set.files.iter().filter(|file| file.package == "klio.v1");
    let services = files.flat_map(|file| &file.services);
    services
        .flat_map(|service| {
            service.methods.iter().map(|method| format!("{}/{}", service.name, method.name))
        })
        .collect()
}

/// Bytes as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

/// A request that says nothing but the cluster, which every request has as its field 1.
fn request(call: &str, cluster: &str) -> Vec<u8> {
    let mut message = vec![0x0a, u8::try_from(cluster.len()).expect("a short name")];
    message.extend(cluster.as_bytes());
    if ["Wal/Receive", "Wal/Compare", "Wal/Refill"].contains(&call) {
        // In the first message, which is field 1.
        let length = u8::try_from(message.len()).expect("a short message");
        message = [vec![0x0a, length], message].concat();
    }
    message
}

/// The first thing that comes back.
async fn ask(channel: &Channel, call: &str, cluster: &str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let path = format!("/klio.v1.{call}").parse().expect("a path");
    let messages = tokio_stream::once(request(call, cluster));
    let answers = grpc.streaming(tonic::Request::new(messages), path, Raw).await?;
    answers.into_inner().message().await.map(drop)
}

async fn issue(site: &Site, args: &[&str]) -> PathBuf {
    let config = site.dir().join("klio-server.toml").display().to_string();
    let outcome = site.klio_server(&[&["client"], args, &["-c", &config]].concat()).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    site.dir().join("clients").join(args[0]).join("klio.toml")
}

async fn bundle_of(site: &Site, caller: &str) -> PathBuf {
    match caller {
        "tenant" => site.bundle(),
        "stranger" => issue(site, &["app@other"]).await,
        role => issue(site, &[role, "--role", role]).await,
    }
}

async fn allowed(channel: &Channel, call: &str) -> bool {
    let asked = tokio::time::timeout(Duration::from_secs(60), ask(channel, call, "main"));
    let answer = asked.await.unwrap_or_else(|_| panic!("{call}: no answer"));
    let Err(status) = answer else { return true };
    let code = Code::of(&status);
    assert_ne!(code, Code::Unauthenticated, "{call}: {status:?}");
    assert_ne!(status.code(), tonic::Code::Unimplemented, "{call}: {status:?}");
    code != Code::Forbidden
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_lets_in_whom_the_table_names_and_nobody_else() {
    install_crypto();
    let listed: BTreeSet<String> = ALLOWED.iter().map(|(call, _)| (*call).to_owned()).collect();
    assert_eq!(calls(), listed, "an RPC without a row, or a row without an RPC");
    let mut site = Site::new().await;
    site.start().await;
    let mut wrong = Vec::new();
    for caller in CALLERS {
        let bundle = bundle_of(&site, caller).await;
        let channel = client::connect(&site, &bundle).await.expect("connect");
        for (call, callers) in ALLOWED {
            let found = allowed(&channel, call).await;
            if found != callers.contains(&caller) {
                let verb = if found { "may" } else { "may not" };
                wrong.push(format!("{caller} {verb} {call}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    site.stop().await;
}

/// Exit status 3 is an answer: of a server that has no cluster yet.
async fn status(site: &Site, bundle: &Path) -> Option<i32> {
    programs::run(site.klio_command_of(bundle, None, &["status"])).await.code
}

/// The map needed a restart, and any authority's unit made an administrator.
#[tokio::test(flavor = "multi_thread")]
async fn roles_of_a_foreign_authority_come_and_go_with_the_configuration_file() {
    install_crypto();
    let mut site = Site::new().await;
    let company = Authority::new("the company's");
    bundle::trust(&site, &company.cert());
    site.start().await;
    let unit = company.client("boss", Some("klio-admin"), Validity::Now);
    let unit = bundle::write(&site, "unit", &unit, "main");
    let named = company.client("watch.example.com", None, Validity::Now);
    let named = bundle::write(&site, "named", &named, "main");
    for bundle in [&unit, &named] {
        assert_eq!(status(&site, bundle).await, Some(15), "{bundle:?} is let in");
    }
    let config = site.dir().join("klio-server.toml");
    let before = std::fs::read_to_string(&config).expect("the configuration");
    let change = |text: &str| std::fs::write(&config, format!("{before}\n{text}")).expect("write");
    change(
        "[auth]\ntrust_units = true\nmap = [{ common_name = \"watch.example.com\", role = \"observer\" }]\n",
    );
    for bundle in [&unit, &named] {
        eventually("the new roles", PATIENCE, || async {
            let code = status(&site, bundle).await;
            (code == Some(3)).then_some(()).ok_or(code)
        })
        .await;
    }
    // What cannot be used changes nothing and is said.
    change("[auth]\nmap = [{ common_name = \"watch.example.com\", role = \"king\" }]\n");
    eventually("the warning", PATIENCE, || async {
        site.log().contains("keeping the previous [auth]")
    })
    .await;
    assert_eq!(status(&site, &named).await, Some(3));
    change("");
    for bundle in [&unit, &named] {
        eventually("the roles to go", PATIENCE, || async {
            let code = status(&site, bundle).await;
            (code == Some(15)).then_some(()).ok_or(code)
        })
        .await;
    }
    site.stop().await;
}
