use std::{
    fs,
    future::Future,
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use nix::sys::socket::{Backlog, listen};
use tempfile::TempDir;

use super::*;
use crate::caller::Account;

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(test)
}

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    (directory, path)
}

fn control(path: &Path) -> io::Result<Control> {
    Control::listen(path, &Account::current().unwrap())
}

fn check(path: &Path) -> io::Result<()> {
    Control::check(path, &Account::current().unwrap())
}

/// Sends this, and gives all of the answer.
fn send(path: &Path, bytes: &[u8]) -> JoinHandle<Vec<u8>> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(bytes).unwrap();
    thread::spawn(move || {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    })
}

async fn heard(client: JoinHandle<Vec<u8>>) -> Vec<u8> {
    tokio::task::spawn_blocking(|| client.join().unwrap())
        .await
        .unwrap()
}

#[test]
fn a_socket_is_its_owners_and_goes_with_the_capture() {
    let (_directory, path) = place();
    block_on(async {
        check(&path).unwrap();
        assert!(!path.exists());
        let control = control(&path).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        drop(control);
        assert!(!path.exists());
    });
}

#[test]
fn what_is_there_stays() {
    let (_directory, path) = place();
    let refused = |kind| {
        for error in [check(&path).unwrap_err(), control(&path).unwrap_err()] {
            assert_eq!(error.kind(), kind, "{error}");
        }
    };
    block_on(async {
        fs::write(&path, "kept").unwrap();
        refused(io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
        fs::remove_file(&path).unwrap();

        fs::create_dir(&path).unwrap();
        refused(io::ErrorKind::AlreadyExists);
        fs::remove_dir(&path).unwrap();

        // A link is not followed, and not replaced.
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        refused(io::ErrorKind::AlreadyExists);
        fs::remove_file(&path).unwrap();

        let served = control(&path).unwrap();
        refused(io::ErrorKind::AddrInUse);
        drop(served);

        // So busy that nobody can connect.
        let busy = UnixListener::bind(&path).unwrap();
        listen(&busy, Backlog::new(0).unwrap()).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        refused(io::ErrorKind::AddrInUse);
        assert!(path.exists());

        let too_long = path.with_file_name("x".repeat(200));
        assert!(check(&too_long).is_err() && control(&too_long).is_err());
        assert!(check(&path.join("no/where")).is_err());
    });
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let (_directory, path) = place();
    block_on(async {
        drop(UnixListener::bind(&path).unwrap());
        check(&path).unwrap();
        assert!(path.exists());
        let mut control = Some(control(&path).unwrap());
        let client = send(&path, b"dump\n");
        Control::next(&mut control).await.answer(Ok(b"{}\n".into()));
        assert_eq!(heard(client).await, b"ok\n{}\n");

        // What is another's by now is not removed.
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(control);
        assert!(path.exists());
        drop(other);
    });
}

#[test]
fn requests_are_answered_one_by_one() {
    let (_directory, path) = place();
    block_on(async {
        let mut control = Some(control(&path).unwrap());
        for request in Request::ALL {
            let client = send(&path, format!("{}\n", request.name()).as_bytes());
            let asked = Control::next(&mut control).await;
            assert_eq!(asked.request, request);
            asked.answer(Err(anyhow::anyhow!("not\nnow")));
            assert_eq!(heard(client).await, b"error: not now\n");
        }
        // Who has gone does no harm.
        let stream = UnixStream::connect(&path).unwrap();
        (&stream).write_all(b"dump\n").unwrap();
        drop(stream);
        let asked = Control::next(&mut control).await;
        let client = send(&path, b"reset\n");
        asked.answer(Ok(vec![0; 1 << 20]));
        Control::next(&mut control).await.answer(Ok(Vec::new()));
        assert_eq!(heard(client).await, b"ok\n");
    });
}

#[test]
fn what_is_no_request_is_refused() {
    let (_directory, path) = place();
    block_on(async {
        let _control = control(&path).unwrap();
        let long = [b'x'; 4096];
        for line in [
            &b"\n"[..],
            b"DUMP\n",
            b"dump \n",
            b"dump\0\n",
            b"\xff\xfe\n",
            &long,
        ] {
            let answer = heard(send(&path, line)).await;
            assert!(answer.starts_with(b"error: no such request"), "{line:?}");
        }
        // Without a line's end.
        let stream = UnixStream::connect(&path).unwrap();
        (&stream).write_all(b"dum").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        let read = tokio::task::spawn_blocking(move || {
            (&stream).read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(read.await.unwrap().starts_with("error: no such request"));
    });
}

#[test]
fn whoever_is_slow_keeps_nobody_else() {
    let (_directory, path) = place();
    block_on(async {
        let mut control = Some(control(&path).unwrap());
        let _silent: Vec<UnixStream> = (0..3)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        // More than a socket holds, and nobody reads it.
        let deaf = UnixStream::connect(&path).unwrap();
        (&deaf).write_all(b"dump\n").unwrap();
        Control::next(&mut control)
            .await
            .answer(Ok(vec![b' '; 8 << 20]));
        for _ in 0..20 {
            let client = send(&path, b"reset\n");
            Control::next(&mut control).await.answer(Ok(Vec::new()));
            assert_eq!(heard(client).await, b"ok\n");
        }
    });
}

#[test]
fn the_last_answer_is_heard() {
    let (_directory, path) = place();
    let content = vec![b' '; 8 << 20];
    let client = block_on(async {
        let mut control = Some(control(&path).unwrap());
        let client = send(&path, b"stop\n");
        let asked = Control::next(&mut control).await;
        asked.answer_last(Ok(content.clone())).await;
        client
    });
    let answer = client.join().unwrap();
    assert_eq!(answer.len(), OK.len() + content.len());

    // Others hear that it is over.
    let client = block_on(async {
        let mut control = Some(control(&path).unwrap());
        let client = send(&path, b"dump\n");
        let asked = Control::next(&mut control).await;
        drop(asked);
        heard(client).await
    });
    assert_eq!(client, b"error: the capture has ended\n");
}
