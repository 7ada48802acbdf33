//! An RPC server has no scheduler: passes are told apart by the layer number.

use std::{
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use expert_trace_tests::{
    server::free_port,
    tracer::{self, Attached, Stats, count, read_log},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::{assert_tokens_of, known_small, llama, llama_program, scratch};

/// A server on a free port of the loopback interface.
pub struct Server {
    child: Child,
    port: u16,
}

impl Server {
    pub fn start() -> Self {
        let port = free_port().unwrap();
        let mut child = Command::new(llama().program("ggml-rpc-server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string(), "-t", "2"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The server says on no descriptor that it listens: it is asked until it answers.
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "the server has ended");
            assert!(Instant::now() < deadline, "the server does not listen");
            std::thread::yield_now();
        }
        Self { child, port }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens, for `--rpc`.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

#[test]
fn the_server_shows_the_ids_of_its_client() {
    let known = known_small();
    let directory = scratch();
    let [path, log, reference] =
        ["stats.json", "log", "reference.log"].map(|name| directory.path().join(name));
    let options = [
        "-p",
        "Hello world, this is a test",
        "-n",
        "12",
        "-no-cnv",
        "--no-warmup",
    ];

    let local = llama_program("llama-completion", &known.path, &options);
    let local_options = [format!("--log={}", reference.display())];
    let output = tracer::run(&local_options, &local)
        .unwrap()
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let server = Server::start();
    let tracer = Attached::to(
        server.pid(),
        &[
            format!("--output={}", path.display()),
            format!("--log={}", log.display()),
        ],
    )
    .unwrap();
    let endpoint = server.endpoint();
    let output = llama_program(
        "llama-completion",
        &known.path,
        &[&options[..], &["--rpc", &endpoint, "-ngl", "99"]].concat(),
    )
    .stdin(Stdio::null())
    .output()
    .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    tracer.interrupt().unwrap();

    let stats = Stats::read(&path).unwrap();
    stats.assert_complete();
    assert_eq!(stats.0["contexts"][0]["pass_source"], "layer_order");
    let seen = read_log(&log).unwrap();
    // The client's probe decode of [0, 0] is no warm-up to the server, which never sees tokens.
    let reference = read_log(&reference).unwrap();
    assert!(reference.len() > 50);
    assert!(
        seen.ends_with(&reference),
        "{} rows of the server, {} of a local run",
        seen.len(),
        reference.len()
    );
    assert_tokens_of(known, &seen);
    let rows = seen.iter().map(|(layer, ids)| (*layer, ids.as_slice()));
    assert_eq!(stats.counts(), count(rows));
}
