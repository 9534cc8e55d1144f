//! SQL over a connection that ends with its value.

use std::ops::Deref;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, NoTls, SimpleQueryMessage};

/// A connection. It derefs to [`tokio_postgres::Client`].
pub struct Session {
    client: Client,
    connection: JoinHandle<()>,
}

impl Session {
    /// Connects (without TLS).
    ///
    /// # Errors
    /// As `tokio_postgres` says.
    pub async fn connect(conninfo: &str) -> Result<Self, Error> {
        let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
        #[expect(clippy::disallowed_methods, reason = "the handle is owned and aborted on drop")]
        let connection = tokio::spawn(async move {
            // Its errors reach the client's calls as well.
            let _ = connection.await;
        });
        Ok(Self { client, connection })
    }

    /// Runs SQL (one statement or several) and returns all rows as text; NULL is the empty string.
    ///
    /// # Errors
    /// As `tokio_postgres` says.
    pub async fn rows(&self, sql: &str) -> Result<Vec<Vec<String>>, Error> {
        let messages = self.client.simple_query(sql).await?;
        Ok(messages
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(
                    (0..row.len()).map(|i| row.get(i).unwrap_or_default().to_owned()).collect(),
                ),
                _ => None,
            })
            .collect())
    }
}

impl Deref for Session {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
