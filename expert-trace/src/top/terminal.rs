//! The terminal, taken for the time of the view.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Read as _, Seek as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use nix::{
    libc,
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

/// A terminal in raw mode that shows its alternate screen. As it was before when this goes.
pub struct Screen {
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
            terminal: Terminal::new(CrosstermBackend::new(tty))?,
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

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = execute!(self.terminal.backend_mut(), LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
        for moved in self.moved.drain(..) {
            moved.back();
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
                let held = tempfile::tempfile()?;
                (held.try_clone()?, Some(held))
            }
        };
        move_to(stream, to.as_fd())?;
        Ok(Self {
            stream,
            terminal,
            held,
        })
    }

    fn back(self) {
        let Self {
            stream,
            terminal,
            held,
        } = self;
        let _ = move_to(stream, terminal.as_fd());
        let Some(mut held) = held else {
            return;
        };
        // Whoever has it still open goes on behind what is shown now.
        let mut out = File::from(terminal);
        let _ = held.rewind();
        let mut bytes = [0; 64 << 10];
        while let Ok(read @ 1..) = held.read(&mut bytes) {
            if out.write_all(&bytes[..read]).is_err() {
                return;
            }
        }
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
