//! Collectors that speak no protocol at all.

use super::Answer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

pub(super) async fn serve(listener: TcpListener, answer: Answer) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(talk(stream, answer));
    }
}

async fn talk(mut stream: TcpStream, answer: Answer) {
    let mut some = [0; 64];
    // Errors: the peer hung up first, which is fine.
    match answer {
        Answer::Garbage => {
            let _ = stream.read(&mut some).await;
            let _ = stream.write_all(b"220 mail.example ESMTP ready\r\n\0\0\xff\xff").await;
        }
        // Whatever else comes is never read: the peer sees a reset.
        Answer::Die => drop(stream.read_exact(&mut some).await),
        _ => std::future::pending().await,
    }
}
