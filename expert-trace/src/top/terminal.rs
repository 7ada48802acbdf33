//! The terminal, taken for the time of the view.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{dup, dup2_raw},
};
use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    crossterm::{
        cursor::{Hide, Show},
        execute,
        terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
    },
};
use tempfile::NamedTempFile;

/// A terminal in raw mode that shows its alternate screen. As it was before when this goes.
pub struct Screen {
    tty: File,
    pub terminal: Terminal<CrosstermBackend<File>>,
    /// Standard streams that are elsewhere meanwhile.
    moved: Vec<Moved>,
}

/// A standard stream that was the terminal.
struct Moved {
    stream: RawFd,
    /// Where it led.
    terminal: OwnedFd,
    /// What is written to it meanwhile; nothing for standard input.
    held: Option<File>,
}

impl Screen {
    /// Takes the controlling terminal. Must be called while nobody else writes to the standard streams.
    ///
    /// # Errors
    /// When there is none, or it is no terminal that can be drawn on.
    pub fn open() -> io::Result<Self> {
        let tty = File::options().read(true).write(true).open("/dev/tty")?;
        let mut screen = Self {
            terminal: Terminal::new(CrosstermBackend::new(tty.try_clone()?))?,
            tty,
            moved: Vec::new(),
        };
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
            if stream.is_terminal() {
                screen.moved.push(Moved::away(stream)?);
            }
        }
        enable_raw_mode()?;
        execute!(screen.terminal.backend_mut(), EnterAlternateScreen, Hide)?;
        Ok(screen)
    }
}

impl Screen {
    /// Waits for keys, or so long.
    ///
    /// # Errors
    /// When the terminal is gone: who reads from it then is not told so.
    pub fn wait(&self, time: Duration) -> io::Result<()> {
        let mut tty = [PollFd::new(self.tty.as_fd(), PollFlags::POLLIN)];
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        match poll(&mut tty, time) {
            // Of its size, it may be.
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
        match tty[0].revents() {
            Some(events) if events.intersects(gone) => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(()),
        }
    }

    /// Gives the terminal back, and what was printed meanwhile.
    pub fn leave(mut self) -> Output {
        self.restore();
        Output(self.moved.drain(..).filter_map(Moved::back).collect())
    }

    fn restore(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = execute!(self.terminal.backend_mut(), LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.moved.is_empty() {
            return;
        }
        // A panic: what was printed is to be seen, too.
        self.restore();
        for output in self.moved.drain(..).filter_map(Moved::back) {
            Output(vec![output]).show();
        }
    }
}

/// What is printed by those that have had the standard streams while the view was shown: files, and where they
/// are to be shown.
pub struct Output(Vec<(File, File)>);

impl Output {
    /// Shows what is new.
    pub fn show(&mut self) {
        let mut bytes = [0; 64 << 10];
        for (held, terminal) in &mut self.0 {
            while let Ok(read @ 1..) = held.read(&mut bytes) {
                if terminal.write_all(&bytes[..read]).is_err() {
                    break;
                }
            }
        }
    }
}

impl Moved {
    fn away(stream: BorrowedFd<'_>) -> io::Result<Self> {
        let terminal = dup(stream)?;
        let stream = stream.as_raw_fd();
        nix::fcntl::fcntl(
            &terminal,
            nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
        )?;
        let (to, held) = match stream {
            libc::STDIN_FILENO => (File::open("/dev/null")?, None),
            _ => {
                // Opened twice, so that reading and writing have places of their own.
                let held = NamedTempFile::new()?;
                (
                    File::options().append(true).open(held.path())?,
                    Some(held.reopen()?),
                )
            }
        };
        move_to(stream, to.as_fd())?;
        Ok(Self {
            stream,
            terminal,
            held,
        })
    }

    fn back(self) -> Option<(File, File)> {
        let Self {
            stream,
            terminal,
            held,
        } = self;
        let _ = move_to(stream, terminal.as_fd());
        Some((held?, File::from(terminal)))
    }
}

/// Has a standard stream lead elsewhere.
fn move_to(stream: RawFd, to: BorrowedFd<'_>) -> io::Result<()> {
    debug_assert!((0..=libc::STDERR_FILENO).contains(&stream) && to.as_raw_fd() > stream);
    // SAFETY: nobody owns a standard stream, and what it led to is kept by others.
    let moved = unsafe { dup2_raw(to, stream) }?;
    // It stays open.
    let _ = std::mem::ManuallyDrop::new(moved);
    Ok(())
}
