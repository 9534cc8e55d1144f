//! A tiny HTTP GET for the admin port, and the numbers on a metrics page.

use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// No admin page takes this long.
const TIMEOUT: Duration = Duration::from_secs(10);

/// GET of `path` from 127.0.0.1: status and body.
///
/// # Errors
/// No connection, no answer within ten seconds, or not HTTP.
pub async fn get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    tokio::time::timeout(TIMEOUT, get_untimed(port, path))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
}

async fn get_untimed(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    // HTTP/1.0: the body ends with the connection and is never chunked.
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let not_http = || std::io::Error::other(format!("not HTTP: {answer:.80}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(not_http)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(not_http)?;
    Ok((status, body.to_owned()))
}

/// A parsed metrics page (Prometheus text format).
#[derive(Debug, Clone)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Metrics {
    /// Parses the page; lines that are no samples are left out (promtool is the judge of form).
    #[must_use]
    pub fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|l| !l.starts_with('#')).filter_map(sample).collect();
        Self { samples }
    }

    /// GET of `/metrics`, parsed.
    ///
    /// # Errors
    /// As [`get`], or a status other than 200.
    pub async fn scrape(port: u16) -> std::io::Result<Self> {
        match get(port, "/metrics").await? {
            (200, page) => Ok(Self::parse(&page)),
            (status, body) => Err(std::io::Error::other(format!("status {status}: {body:.200}"))),
        }
    }

    /// The value of the sample of this name that has (at least) these labels.
    ///
    /// # Panics
    /// When more than one has: the labels given do not name one series.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut found = self.samples.iter().filter(|s| s.name == name && s.has(labels));
        let first = found.next()?;
        assert!(found.next().is_none(), "metric {name} with {labels:?}: more than one series");
        Some(first.value)
    }

    /// Sum over all samples of this name with (at least) these labels; 0 when there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found = self.samples.iter().filter(|s| s.name == name && s.has(labels));
        found.map(|s| s.value).sum()
    }

    /// All names on the page, sorted, each once.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.samples.iter().map(|s| s.name.clone()).collect();
        names.sort();
        names.dedup();
        names
    }
}

impl Sample {
    fn has(&self, labels: &[(&str, &str)]) -> bool {
        labels.iter().all(|(k, v)| self.labels.iter().any(|(key, value)| key == k && value == v))
    }
}

fn sample(line: &str) -> Option<Sample> {
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inside) => labels(inside)?,
        None => (Vec::new(), rest),
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// `a="b",c="d"} 1` to the labels and what follows the brace; `\"`, `\\` and `\n` are unescaped.
fn labels(mut rest: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (key, quoted) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = quoted.char_indices();
        loop {
            match chars.next()? {
                (at, '"') => {
                    rest = quoted.get(at + 1..)?;
                    break;
                }
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        }
        labels.push((key.to_owned(), value));
    }
}

#[cfg(test)]
mod tests {
    use super::Metrics;

    #[test]
    fn a_sample_is_found_by_name_and_some_of_its_labels() {
        let page = "# HELP a x\n# TYPE a gauge\na{cluster_name=\"one\",tier=\"1\"} 3\n\
                    a{cluster_name=\"tw\\\"o, }\",tier=\"1\"} 4.5\nb 1e3 1700000000\n";
        let metrics = Metrics::parse(page);
        assert_eq!(metrics.value("a", &[("cluster_name", "one")]), Some(3.0));
        assert_eq!(metrics.value("a", &[("cluster_name", "tw\"o, }")]), Some(4.5));
        assert_eq!(metrics.value("a", &[("cluster_name", "three")]), None);
        assert_eq!(metrics.value("b", &[]), Some(1000.0));
        assert!((metrics.sum("a", &[("tier", "1")]) - 7.5).abs() < f64::EPSILON);
        assert_eq!(metrics.names(), ["a", "b"]);
    }
}
