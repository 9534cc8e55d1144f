//! Counts the calls of klio.v1 by caller, from their first byte to the end of their answer, and refuses calls over the
//! quota.
//!
//! The caller is identified here, once; handlers find the identity in the request.

use crate::access::auth::{Auth, Identity};
use crate::quota::{Counted, Quotas, Whose};
use http::{Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tonic::Status;
use tower::{Layer, Service};

/// Wraps a service so that its calls are counted.
#[derive(Clone)]
pub struct CountLayer {
    pub auth: Auth,
    /// The limits.
    pub quotas: Quotas,
}

impl<S> Layer<S> for CountLayer {
    type Service = Counting<S>;
    fn layer(&self, inner: S) -> Counting<S> {
        Counting { inner, with: self.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Clone)]
pub struct Counting<S> {
    inner: S,
    with: CountLayer,
}

/// Whose quota a caller uses; nobody's with plaintext.
pub fn whose(identity: &Identity) -> Option<Whose> {
    identity.role.as_ref()?;
    Some(match identity.tenant() {
        Some(cluster) => Whose::Cluster(cluster.clone()),
        None => Whose::Person(identity.name.clone()),
    })
}

impl CountLayer {
    /// `None` for calls outside klio.v1: health and reflection return no data and hold no resources.
    fn admit<I>(&self, request: &mut Request<I>) -> Result<Option<Counted>, Status> {
        let method = request.uri().path().trim_start_matches('/').to_owned();
        if !method.starts_with("klio.v1.") {
            return Ok(None);
        }
        let identity = self.auth.identify_by(request.extensions())?;
        let place = whose(&identity).map(|whose| self.quotas.call(whose, &method)).transpose()?;
        request.extensions_mut().insert(identity);
        Ok(place)
    }
}

impl<S, I, O> Service<Request<I>> for Counting<S>
where
    S: Service<Request<I>, Response = Response<O>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    O: Default + Send + 'static,
{
    type Response = Response<CountedBody<O>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<I>) -> Self::Future {
        let place = match self.with.admit(&mut request) {
            Ok(place) => place,
            Err(status) => {
                let refused = status.into_http::<CountedBody<O>>();
                return Box::pin(async move { Ok(refused) });
            }
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| CountedBody { body: Box::pin(body), _place: place }))
        })
    }
}

/// The body of an answer, which holds the place of its call.
pub struct CountedBody<B> {
    body: Pin<Box<B>>,
    _place: Option<Counted>,
}

impl<B: Default> Default for CountedBody<B> {
    fn default() -> Self {
        Self { body: Box::pin(B::default()), _place: None }
    }
}

impl<B: Body> Body for CountedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.body.as_mut().poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
