//! A real S3 endpoint in this process (s3s over a directory, SigV4 checked), with a fault layer in front.
//!
//! Also used by the server crate's consumer tests, by `#[path]`.

#![allow(dead_code)]

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{Request, body::Incoming};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio::task::JoinSet;

/// Path of the bucket on the endpoint.
pub const BUCKET: &str = "archive";

/// What the endpoint does instead of answering normally.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Answers with this status and S3 error code.
    Status(u16, &'static str),
    /// Never answers.
    Hang,
    /// Closes the connection after this many bytes of the request's body.
    ResetAfter(usize),
    /// Stores the request's data, then closes the connection instead of answering.
    ResetAfterStoring,
}

type Rule = Box<dyn FnMut(&http::request::Parts) -> Option<Fault> + Send>;

/// The endpoint; stops when dropped.
pub struct S3 {
    /// The URL, such as `http://127.0.0.1:port`.
    pub endpoint: String,
    directory: tempfile::TempDir,
    rule: Arc<Mutex<Rule>>,
    requests: Arc<Mutex<Vec<String>>>,
    _accept: JoinSet<()>,
}

impl S3 {
    /// Starts an endpoint with one empty bucket.
    pub async fn start() -> Self {
        rustls::crypto::ring::default_provider().install_default().ok();
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join(BUCKET)).unwrap();
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(directory.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single("AKTEST", "secret-of-the-test"));
        let service = builder.build();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let rule: Arc<Mutex<Rule>> = Arc::new(Mutex::new(Box::new(|_| None)));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut accept = JoinSet::new();
        let (rules, seen) = (Arc::clone(&rule), Arc::clone(&requests));
        accept.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((socket, _)) = listener.accept().await else { continue };
                let (service, rule, seen) =
                    (service.clone(), Arc::clone(&rules), Arc::clone(&seen));
                let handler = hyper::service::service_fn(move |request: Request<Incoming>| {
                    answer(service.clone(), Arc::clone(&rule), Arc::clone(&seen), request)
                });
                connections.spawn(async move {
                    let http = Builder::new(TokioExecutor::new());
                    http.serve_connection(TokioIo::new(socket), handler).await.ok();
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self { endpoint, directory, rule, requests, _accept: accept }
    }

    /// Applies `rule` to each request from now on.
    pub fn on_request(
        &self,
        rule: impl FnMut(&http::request::Parts) -> Option<Fault> + Send + 'static,
    ) {
        *self.rule.lock().unwrap() = Box::new(rule);
    }

    /// Answers all requests normally again.
    pub fn heal(&self) {
        self.on_request(|_| None);
    }

    /// Method and path of each request so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// The path of an object's file.
    pub fn object(&self, key: &str) -> PathBuf {
        self.directory.path().join(BUCKET).join(key)
    }

    /// Access key and secret.
    pub fn credentials(&self) -> (&'static str, &'static str) {
        ("AKTEST", "secret-of-the-test")
    }
}

async fn answer(
    service: s3s::service::S3Service,
    rule: Arc<Mutex<Rule>>,
    seen: Arc<Mutex<Vec<String>>>,
    request: Request<Incoming>,
) -> Result<http::Response<s3s::Body>, std::io::Error> {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    seen.lock().unwrap().push(format!("{} {}{query}", parts.method, parts.uri.path()));
    let fault = (rule.lock().unwrap())(&parts);
    let reset = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    match fault {
        None => call(service, parts, body).await,
        Some(Fault::Status(status, code)) => {
            body.collect().await.ok();
            let xml = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code></Error>");
            let response = http::Response::builder().status(status);
            Ok(response.body(s3s::Body::from(Bytes::from(xml))).unwrap())
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::ResetAfter(bytes)) => {
            let mut body = std::pin::pin!(body);
            let mut left = bytes;
            while let Some(Ok(frame)) = body.as_mut().frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, |data| data.len()));
                if left == 0 {
                    break;
                }
            }
            Err(reset())
        }
        Some(Fault::ResetAfterStoring) => {
            call(service, parts, body).await?;
            Err(reset())
        }
    }
}

async fn call(
    service: s3s::service::S3Service,
    parts: http::request::Parts,
    body: Incoming,
) -> Result<http::Response<s3s::Body>, std::io::Error> {
    let request = Request::from_parts(parts, s3s::Body::from(body));
    service.call(request).await.map_err(|_| std::io::Error::other("s3s failed"))
}
