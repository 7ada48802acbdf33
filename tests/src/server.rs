//! A `llama-server`, asked over HTTP/1.1.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Longest wait for a server to have its model loaded, and for an answer. A device in software
/// compiles its shaders the first time.
const LIMIT: Duration = Duration::from_secs(300);

/// Between two questions whether the server is ready: it says so nowhere else.
const PAUSE: Duration = Duration::from_millis(10);

/// A port of the loopback interface that is free when asked for; nothing else on the machine of the
/// tests asks at the same time.
///
/// # Errors
///
/// If there is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// A running server, or a program that runs one. Dropping it ends the process.
pub struct Server {
    child: Child,
    port: u16,
    said: PathBuf,
}

impl Server {
    /// Adds to the command where to listen, starts it, and returns when it is ready to be asked. What
    /// it says goes to the file `said`.
    ///
    /// # Errors
    ///
    /// If it cannot be started, ends, or is not ready in time.
    pub fn start(command: &mut Command, said: &Path) -> Result<Server> {
        let port = free_port()?;
        let log = File::create(said).with_context(|| format!("create {}", said.display()))?;
        command
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut server = Server {
            child,
            port,
            said: said.to_owned(),
        };
        server.wait_until_ready()?;
        Ok(server)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        // Until it listens, it refuses; until the model is loaded, it answers with an error.
        while self.ask("GET", "/health", "").is_err() {
            let status = self.child.try_wait()?;
            ensure!(
                status.is_none(),
                "the server has ended ({status:?}): {}",
                self.said()
            );
            ensure!(
                Instant::now() < deadline,
                "the server is not ready: {}",
                self.said()
            );
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// The process that was started.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has said.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }

    /// Has it decode a prompt, without anything that is left of the last one, and generate `n` tokens,
    /// which are returned. All but the last of them are decoded, too.
    ///
    /// # Errors
    ///
    /// If it answers with anything else.
    pub fn complete(&self, prompt: &[u32], n: usize) -> Result<Vec<u32>> {
        let question = json!({
            "prompt": prompt,
            "n_predict": n,
            "temperature": 0,
            "cache_prompt": false,
            "return_tokens": true,
        });
        let answer = self.post("/completion", &question)?;
        let tokens = answer["tokens"].as_array().map(Vec::as_slice);
        let tokens: Option<Vec<u32>> = tokens
            .unwrap_or_default()
            .iter()
            .map(|token| u32::try_from(token.as_u64()?).ok())
            .collect();
        let tokens = tokens.filter(|tokens| tokens.len() == n);
        tokens.with_context(|| format!("not {n} tokens: {answer}"))
    }

    /// Asks a question, and gives the answer.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn post(&self, path: &str, question: &Value) -> Result<Value> {
        let answer = self.ask("POST", path, &question.to_string())?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// Ends it as a service manager does, and gives what became of it.
    ///
    /// # Errors
    ///
    /// If it is not there any more.
    pub fn stop(mut self) -> Result<(ExitStatus, String)> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        Ok((status, self.said()))
    }

    /// The body of the answer to one question, for which a connection is made.
    fn ask(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        connection.set_read_timeout(Some(LIMIT))?;
        write!(
            connection,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        body_of(&answer).map(str::to_owned)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// The body of a whole answer that says "200 OK".
fn body_of(answer: &str) -> Result<&str> {
    let parts = answer.split_once("\r\n\r\n");
    let (head, body) = parts.with_context(|| format!("no HTTP answer: {answer:?}"))?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{answer}");
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse())?
            .ok()
    });
    ensure!(length == Some(body.len()), "not the whole answer: {answer}");
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_answer_is_one() {
        let body = |head: &str| body_of(&format!("{head}\r\n\r\n[5]")).map(str::to_owned);
        assert_eq!(body("HTTP/1.1 200 OK\r\nContent-Length: 3").unwrap(), "[5]");
        for head in [
            "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3",
            "HTTP/1.1 200 OK\r\nContent-Length: 4",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked",
        ] {
            assert!(body(head).is_err(), "{head}");
        }
        assert!(body_of("HTTP/1.1 200 OK").is_err());
    }

    #[test]
    fn a_server_that_ends_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let said = directory.path().join("said");
        let mut command = Command::new("sh");
        command.args(["-c", "echo no model; exit 1"]);
        let error = Server::start(&mut command, &said).err().unwrap();
        assert!(error.to_string().contains("no model"), "{error}");
    }
}
