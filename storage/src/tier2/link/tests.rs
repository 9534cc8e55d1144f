//! Timeouts, tested with a simulated clock.

use super::*;
use futures::StreamExt;

const PATIENCE: Duration = Duration::from_secs(60);

fn request(bytes: usize) -> HttpRequest {
    let mut request = HttpRequest::new(PutPayload::from(vec![7; bytes]).into());
    *request.method_mut() = http::Method::PUT;
    request
}

/// A connection that takes the first `pieces` pieces, one in each `every`, and answers after all of them.
async fn takes(request: HttpRequest, pieces: usize, every: Duration) -> Result<(), HttpError> {
    let mut body = futures::stream::iter(chunks(request.into_body()).collect::<Vec<_>>()).fuse();
    for _ in 0..pieces {
        tokio::time::sleep(every).await;
        if body.next().await.is_none() {
            return Ok(());
        }
    }
    let _kept = body;
    std::future::pending().await
}

fn text(error: &HttpError) -> String {
    std::error::Error::source(error).unwrap().to_string()
}

/// With a limit of 60 seconds for a whole PUT, parts of 8 MiB never got through a slow uplink.
#[tokio::test(start_paused = true)]
async fn a_body_that_keeps_being_taken_may_take_hours() {
    let link = Link::new(PATIENCE);
    let (request, sending) = Sending::watch(request(8 << 20));
    let begun = Instant::now();
    let slow = takes(request, usize::MAX, Duration::from_secs(50));
    link.answered(slow, &sending).await.unwrap();
    assert!(begun.elapsed() > Duration::from_secs(7 * 3600));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stands_still_fails_after_the_patience_and_says_where() {
    let link = Link::new(PATIENCE);
    let (request, sending) = Sending::watch(request(8 << 20));
    let begun = Instant::now();
    let stands = takes(request, 4, Duration::from_secs(50));
    let error = link.answered(stands, &sending).await.unwrap_err();
    assert_eq!(error.kind(), HttpErrorKind::Timeout);
    let told = text(&error);
    assert!(told.contains("stands still: 65536 of 8388608 bytes"), "{told}");
    assert!(told.contains("tier2.request_timeout_seconds"), "{told}");
    assert_eq!(begun.elapsed().as_secs(), 4 * 50 + 60);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_come_is_waited_for_as_long_as_the_link_is_slow() {
    let link = Link::new(PATIENCE);
    let (question, sending) = Sending::watch(HttpRequest::new(HttpRequestBody::empty()));
    let begun = Instant::now();
    let error = link.answered(takes(question, 0, PATIENCE), &sending).await.unwrap_err();
    assert!(text(&error).contains("no answer"), "{}", text(&error));
    assert_eq!(begun.elapsed().as_secs(), 60, "a question");
    // All of it is in buffers after 512 seconds, so it may take twice as long to arrive.
    let (body, sending) = Sending::watch(request(8 << 20));
    let pieces = (8 << 20) / PIECE_BYTES;
    let begun = Instant::now();
    let error =
        link.answered(takes(body, pieces, Duration::from_secs(1)), &sending).await.unwrap_err();
    assert!(text(&error).contains("no answer"), "{}", text(&error));
    assert_eq!(begun.elapsed().as_secs(), 512 + 60 + 2 * 512);
}

#[tokio::test]
async fn what_the_kernel_gave_up_is_told_in_the_same_words() {
    let link = Link::new(PATIENCE);
    let ended = |kind: io::ErrorKind| async move {
        Err::<(), _>(HttpError::new(HttpErrorKind::Timeout, io::Error::from(kind)))
    };
    let (body, sending) = Sending::watch(request(100_000));
    let error = link.answered(ended(io::ErrorKind::TimedOut), &sending).await.unwrap_err();
    assert!(!text(&error).contains("stands still"), "it never connected: {}", text(&error));
    drop(body);
    let error = link.answered(ended(io::ErrorKind::TimedOut), &sending).await.unwrap_err();
    assert!(text(&error).contains("stands still: 100000 of 100000"), "{}", text(&error));
    assert_eq!(error.kind(), HttpErrorKind::Timeout);
    let error = link.answered(ended(io::ErrorKind::ConnectionReset), &sending).await.unwrap_err();
    assert!(!text(&error).contains("stands still"), "{}", text(&error));
}

#[test]
fn what_goes_in_pieces_keeps_its_bytes_and_says_its_length() {
    let whole: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
    let halves = [&whole[..40_001], &whole[40_001..]].map(Bytes::copy_from_slice);
    let payload: PutPayload = halves.into_iter().collect();
    let (request, sending) = Sending::watch(HttpRequest::new(payload.into()));
    assert_eq!(request.headers()[CONTENT_LENGTH], "100000");
    assert_eq!(sending.bytes, 100_000);
    let pieces: Vec<Bytes> = chunks(request.into_body()).collect();
    assert!(pieces.len() >= 7 && pieces.iter().all(|piece| piece.len() <= PIECE_BYTES));
    assert_eq!(pieces.concat(), whole);
    assert_eq!(sending.taken.lock().bytes, 0, "held, not taken");
    drop(pieces);
    assert_eq!(sending.taken.lock().bytes, 100_000);
}

#[test]
fn what_is_no_upload_is_left_as_it_is() {
    let (request, sending) = Sending::watch(HttpRequest::new(Bytes::from_static(b"<xml/>").into()));
    assert_eq!(request.body().as_bytes().map(|b| &b[..]), Some(&b"<xml/>"[..]));
    assert_eq!(sending.bytes, 0);
}
