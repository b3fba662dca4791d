//! A client of the admin address that knows as little as it needs, so that tests see every byte.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::patiently;

/// An answer, of which the head is read.
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its status line and headers.
    pub head: String,
    body: BufReader<TcpStream>,
}

impl Answer {
    /// The rest.
    pub async fn text(mut self) -> String {
        let mut text = String::new();
        patiently("an answer", self.body.read_to_string(&mut text)).await.unwrap();
        if self.head.to_lowercase().contains("transfer-encoding: chunked") { without_chunks(&text) } else { text }
    }

    /// The rest, as JSON.
    pub async fn json(self) -> Value {
        serde_json::from_str(&self.text().await).unwrap()
    }

    /// The next line that is not empty and no chunk's length.
    pub async fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(patiently("a line", self.body.read_line(&mut line)).await.unwrap() > 0, "the stream has ended");
            let line = line.trim();
            if !line.is_empty() && u32::from_str_radix(line, 16).is_err() {
                return line.to_owned();
            }
        }
    }
}

/// <https://www.rfc-editor.org/rfc/rfc9112#section-7.1>
fn without_chunks(text: &str) -> String {
    let mut whole = String::new();
    let mut rest = text;
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole += &after[..length];
        rest = after[length..].strip_prefix("\r\n").unwrap();
    }
    whole
}

/// Sends a request with these lines of header.
pub async fn send(address: SocketAddr, request: &str, headers: &[&str]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("{request} HTTP/1.1\r\n{}\r\nConnection: close\r\n\r\n", headers.join("\r\n")).as_bytes())
        .await
        .unwrap();
    let mut body = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(patiently("an answer", body.read_line(&mut head)).await.unwrap() > 0, "no answer: {head}");
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body }
}

/// Asks for a path.
pub async fn get(address: SocketAddr, path: &str) -> Answer {
    send(address, &format!("GET {path}"), &["Host: localhost"]).await
}
