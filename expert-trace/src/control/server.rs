//! Who is asked: accepts, reads and answers beside the capture, which a client that is slow does not hold up.

use std::{
    fs, io, mem,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
        },
        stat::{Mode, fchmod},
    },
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

use super::{ERROR, OK, Request};
use crate::caller::Account;

/// Connections at once; more wait.
const CONNECTIONS: usize = 8;
/// How long a client may take to ask.
const TO_ASK: Duration = Duration::from_secs(5);
/// How long we stay for a client that reads its answer at our end.
const TO_HEAR: Duration = Duration::from_secs(1);
/// How long a client may take to read its answer.
const TO_READ: Duration = Duration::from_secs(60);
/// Longest line that is read: much longer than any request, so that other ones are answered, too.
const LINE: usize = 4096;

/// Somebody waits for an answer.
#[derive(Debug)]
pub struct Asked {
    /// What for.
    pub request: Request,
    answer: oneshot::Sender<Vec<u8>>,
    /// Ends with the connection.
    over: oneshot::Receiver<()>,
}

impl Asked {
    /// Answers. Who has gone does not hear it.
    pub fn answer(self, answer: anyhow::Result<Vec<u8>>) {
        let bytes = match answer {
            Ok(content) => [OK.as_bytes(), &content].concat(),
            Err(error) => refusal(&format!("{error:#}")),
        };
        let _ = self.answer.send(bytes);
    }

    /// Answers, and gives the answer some time to be read: nobody writes it once we have ended.
    pub async fn answer_last(mut self, answer: anyhow::Result<Vec<u8>>) {
        let (_, never) = oneshot::channel();
        let over = mem::replace(&mut self.over, never);
        self.answer(answer);
        let _ = timeout(TO_HEAR, over).await;
    }
}

fn refusal(why: &str) -> Vec<u8> {
    format!("{ERROR}{}\n", why.replace('\n', " ")).into_bytes()
}

/// A socket by which a capture is asked. It goes with this.
#[derive(Debug)]
pub struct Control {
    asked: mpsc::Receiver<Asked>,
    accepting: JoinHandle<()>,
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
    account: Account,
}

impl Control {
    /// Makes the socket, with the rights of an account: nobody else, but root, can connect. One that is
    /// left of a tracer that was killed is replaced. Needs a tokio runtime.
    ///
    /// # Errors
    /// When something else is there, or another capture is asked by it, or the account cannot make it.
    pub fn listen(path: &Path, account: &Account) -> io::Result<Self> {
        let (listener, file) = account.with_rights(|| {
            if is_stale(path)? {
                fs::remove_file(path)?;
            }
            let listener = bound(path)?;
            let metadata = fs::symlink_metadata(path)?;
            Ok((listener, (metadata.dev(), metadata.ino())))
        })?;
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let (asks, asked) = mpsc::channel(1);
        let accepting = tokio::spawn(accept(listener, account.uid.as_raw(), asks));
        Ok(Self {
            asked,
            accepting,
            path: path.to_owned(),
            file,
            account: account.clone(),
        })
    }

    /// Why [`listen`](Self::listen) would fail. No file is created that stays.
    ///
    /// # Errors
    /// Those of [`listen`](Self::listen).
    pub fn check(path: &Path, account: &Account) -> io::Result<()> {
        account.with_rights(|| {
            if is_stale(path)? {
                return Ok(());
            }
            bound(path)?;
            fs::remove_file(path)
        })
    }

    /// Waits until the capture is asked something; for ever where it cannot be.
    pub async fn next(control: &mut Option<Self>) -> Asked {
        if let Some(control) = control
            && let Some(asked) = control.asked.recv().await
        {
            return asked;
        }
        std::future::pending().await
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = self.account.with_rights(|| {
            let metadata = fs::symlink_metadata(&self.path)?;
            match (metadata.dev(), metadata.ino()) == self.file {
                true => fs::remove_file(&self.path),
                false => Ok(()),
            }
        });
    }
}

/// Whether a socket is there that nobody listens on any more.
fn is_stale(path: &Path) -> io::Result<bool> {
    let error = |kind, text| Err(io::Error::new(kind, text));
    match fs::symlink_metadata(path) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(other) => return Err(other),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return error(
                io::ErrorKind::AlreadyExists,
                "is there, and is no socket; name another place",
            );
        }
        Ok(_) => {}
    }
    // One that is busy must not keep us waiting.
    let descriptor = unnamed(SockFlag::SOCK_NONBLOCK)?;
    match connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => Ok(true),
        Ok(()) | Err(Errno::EAGAIN) => error(
            io::ErrorKind::AddrInUse,
            "is the socket of another program that runs; name another place",
        ),
        Err(other) => Err(other.into()),
    }
}

fn unnamed(flags: SockFlag) -> nix::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// A listening socket with a name, which has its rights from the beginning.
fn bound(path: &Path) -> io::Result<net::UnixListener> {
    let descriptor = unnamed(SockFlag::empty())?;
    // `unix_bind_bsd` (net/unix/af_unix.c) gives the file the mode of the socket, less the umask.
    fchmod(&descriptor, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(descriptor.as_raw_fd(), &UnixAddr::new(path)?).map_err(|error| match error {
        Errno::ENOENT => io::Error::new(
            io::ErrorKind::NotFound,
            "its directory is not there; create it first",
        ),
        error => error.into(),
    })?;
    listen(&descriptor, Backlog::new(CONNECTIONS as i32)?)?;
    Ok(descriptor.into())
}

async fn accept(listener: UnixListener, owner: u32, asks: mpsc::Sender<Asked>) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&free).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            // Without descriptors, say. Others give theirs back in time.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let asks = asks.clone();
        tokio::spawn(async move {
            let _ = serve(&stream, owner, &asks).await;
            drop(place);
        });
    }
}

async fn serve(stream: &UnixStream, owner: u32, asks: &mpsc::Sender<Asked>) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    // Read in any case: what is left of it would reset the connection, and the answer with it.
    let line = timeout(TO_ASK, line(stream)).await??;
    // Whoever waits for the end of the connection hears of it when this goes.
    let (_open, over) = oneshot::channel();
    let mut requests = Request::ALL.into_iter();
    let answer = if ![0, owner].contains(&peer) {
        refusal("this capture is somebody else's: ask as its owner, or as root")
    } else if let Some(request) = requests.find(|request| request.name().as_bytes() == line) {
        ask(request, over, asks).await
    } else {
        refusal("no such request; dump, reset and stop are known")
    };
    timeout(TO_READ, write(stream, &answer)).await?
}

async fn ask(request: Request, over: oneshot::Receiver<()>, asks: &mpsc::Sender<Asked>) -> Vec<u8> {
    let (answer, answered) = oneshot::channel();
    let asked = Asked {
        request,
        answer,
        over,
    };
    let has_ended = || refusal("the capture has ended");
    if asks.send(asked).await.is_err() {
        return has_ended();
    }
    answered.await.unwrap_or_else(|_| has_ended())
}

/// A line without its end, or what there is of one that is too long.
async fn line(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        stream.readable().await?;
        let mut bytes = [0; 64];
        let read = match stream.try_read(&mut bytes) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        line.extend(&bytes[..read]);
        if let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            line.truncate(end);
            return Ok(line);
        }
        if read == 0 || line.len() >= LINE {
            return Ok(line);
        }
    }
}

async fn write(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
