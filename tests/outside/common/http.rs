//! A minimal client of the admin address, so that tests see every byte.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::patiently;

/// A response whose head has been read.
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its status line and headers.
    pub head: String,
    body: BufReader<TcpStream>,
    /// The part of a chunked body that has been read, but not yet returned as lines.
    read: Option<String>,
}

impl Answer {
    /// The value of a header, if it is there.
    pub fn header(&self, name: &str) -> Option<&str> {
        let pairs = self.head.lines().filter_map(|line| line.split_once(": "));
        pairs.filter(|(it, _)| it.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }

    /// The rest of the body.
    pub async fn text(mut self) -> String {
        let mut text = String::new();
        patiently("an answer", self.body.read_to_string(&mut text)).await.unwrap();
        if self.read.is_some() { without_chunks(&text) } else { text }
    }

    /// The rest of the body, as JSON.
    pub async fn json(self) -> Value {
        serde_json::from_str(&self.text().await).unwrap()
    }

    /// The next line that is not empty.
    pub async fn line(&mut self) -> String {
        loop {
            let line = self.any_line().await;
            let line = line.trim();
            if !line.is_empty() {
                return line.to_owned();
            }
        }
    }

    async fn any_line(&mut self) -> String {
        let mut line = String::new();
        let Some(read) = &mut self.read else {
            assert!(patiently("a line", self.body.read_line(&mut line)).await.unwrap() > 0, "the stream has ended");
            return line;
        };
        while !read.contains('\n') {
            line.clear();
            patiently("a chunk", self.body.read_line(&mut line)).await.unwrap();
            let length = usize::from_str_radix(line.trim(), 16).unwrap();
            assert!(length > 0, "the stream has ended");
            let mut chunk = vec![0; length + "\r\n".len()];
            patiently("a chunk", self.body.read_exact(&mut chunk)).await.unwrap();
            *read += str::from_utf8(&chunk[..length]).unwrap();
        }
        let (line, rest) = read.split_once('\n').unwrap();
        let (line, rest) = (line.to_owned(), rest.to_owned());
        *read = rest;
        line
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
    send_with_body(address, request, headers, "").await
}

/// Sends a form with these lines of header.
pub async fn send_form(address: SocketAddr, path: &str, headers: &[&str], form: &str) -> Answer {
    let length = format!("Content-Length: {}", form.len());
    let headers = [headers, &["Content-Type: application/x-www-form-urlencoded", &length]].concat();
    send_with_body(address, &format!("POST {path}"), &headers, form).await
}

/// Sends JSON from a program.
pub async fn send_json(address: SocketAddr, request: &str, headers: &[&str], json: &str) -> Answer {
    let length = format!("Content-Length: {}", json.len());
    let headers = [&["Host: localhost", "Content-Type: application/json", &length], headers].concat();
    send_with_body(address, request, &headers, json).await
}

/// Sends a request with these lines of header and this body.
pub async fn send_with_body(address: SocketAddr, request: &str, headers: &[&str], body: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("{request} HTTP/1.1\r\n{}\r\nConnection: close\r\n\r\n", headers.join("\r\n"));
    stream.write_all((head + body).as_bytes()).await.unwrap();
    let mut body = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(patiently("an answer", body.read_line(&mut head)).await.unwrap() > 0, "no answer: {head}");
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let read = head.to_lowercase().contains("transfer-encoding: chunked").then(String::new);
    Answer { status, head, body, read }
}

/// Requests a path.
pub async fn get(address: SocketAddr, path: &str) -> Answer {
    send(address, &format!("GET {path}"), &["Host: localhost"]).await
}
