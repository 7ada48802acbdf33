//! A process as seen from outside: what it maps, what it runs, how it was started.

use std::{
    borrow::Cow,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::{
        fd::AsRawFd as _,
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    unistd::{Gid, Uid},
};

use crate::caller::{Account, Environment};

/// One file mapped by a process, by its first mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedFile {
    /// Device and inode: what the kernel attaches uprobes by.
    pub id: FileId,
    /// Path as the process sees it; no longer true when `deleted`.
    pub path: PathBuf,
    /// The file has been replaced or removed since.
    pub deleted: bool,
    /// Address range of the first mapping, as `/proc/PID/map_files` names it.
    range: String,
    /// Its parts that are mapped executable.
    code: Vec<Code>,
}

/// A part of a file that is mapped as code.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Code {
    /// In the file, in bytes.
    offset: u64,
    /// In the memory of the process.
    addresses: Range<u64>,
}

/// Identity of a file: device (as `/proc/PID/maps` prints it) and inode.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    device: String,
    inode: u64,
}

impl MappedFile {
    /// Path by which *we* reach the mapped file, also when it was deleted or lies in another mount
    /// namespace: the kernel's own link to the mapping.
    pub fn reachable_path(&self, pid: u32) -> PathBuf {
        let link = self.link(pid);
        if link.exists() {
            return link;
        }
        // map_files needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the initial namespace.
        in_root(pid, &self.path)
    }

    /// Opens what is mapped, and nothing else that its path may lead to by now: that the process maps
    /// it shows that it could read it.
    ///
    /// # Errors
    /// When it is not mapped any more, we may not follow the kernel's link, or it is no regular file.
    pub fn open(&self, pid: u32) -> io::Result<File> {
        open_regular(&self.link(pid))
    }

    /// Whether any part is mapped executable.
    pub fn is_executable(&self) -> bool {
        !self.code.is_empty()
    }

    /// Where the process has the code at an offset of the file.
    pub fn address_of(&self, file_offset: u64) -> Option<u64> {
        self.code.iter().find_map(|code| {
            let address = code.addresses.start + file_offset.checked_sub(code.offset)?;
            code.addresses.contains(&address).then_some(address)
        })
    }

    /// Which offset of the file the process has at an address, as code.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        self.code.iter().find_map(|code| {
            let into = address.checked_sub(code.addresses.start)?;
            code.addresses
                .contains(&address)
                .then(|| code.offset.checked_add(into))?
        })
    }

    /// Reads the path again where `/proc/PID/maps` has not told it for certain: it writes a line feed as
    /// `\012`, and a name can end as that of a deleted file does.
    fn make_certain(&mut self, pid: u32) {
        let escaped = self.path.as_os_str().as_bytes().contains(&b'\\');
        if !escaped && !self.deleted {
            return;
        }
        let link = self.link(pid);
        let (Ok(path), Ok(mapped)) = (fs::read_link(&link), fs::metadata(&link)) else {
            return;
        };
        let is_mapped =
            |named: fs::Metadata| (named.dev(), named.ino()) == (mapped.dev(), mapped.ino());
        if fs::metadata(in_root(pid, &path)).is_ok_and(is_mapped) {
            (self.path, self.deleted) = (path, false);
        } else {
            let bytes = path.as_os_str().as_bytes();
            let name = bytes.strip_suffix(DELETED).unwrap_or(bytes);
            self.path = OsStr::from_bytes(name).into();
        }
    }

    fn link(&self, pid: u32) -> PathBuf {
        format!("/proc/{pid}/map_files/{}", self.range).into()
    }
}

/// Files a process maps, in the order of their addresses.
///
/// # Errors
/// When the process is gone or we may not look.
pub fn mapped_files(pid: u32) -> io::Result<Vec<MappedFile>> {
    let mut files = parse_maps(&fs::read(format!("/proc/{pid}/maps"))?);
    for file in &mut files {
        file.make_certain(pid);
    }
    Ok(files)
}

/// What `/proc` appends to the names of files that are gone (`d_path` in fs/d_path.c).
const DELETED: &[u8] = b" (deleted)";

/// An absolute path of a process, as we reach it.
pub fn in_root(pid: u32, path: &Path) -> PathBuf {
    let mut reached = OsString::from(format!("/proc/{pid}/root"));
    reached.push(path);
    reached.into()
}

/// Reads the lines of `/proc/PID/maps` (fs/proc/task_mmu.c, `show_map_vma`). Lines that do not look
/// so are passed over: the paths are the target's to choose.
fn parse_maps(maps: &[u8]) -> Vec<MappedFile> {
    let mut files: Vec<MappedFile> = Vec::new();
    for line in maps.split(|byte| *byte == b'\n') {
        let Some(mapping) = parse_line(line) else {
            continue;
        };
        match files.iter_mut().find(|file| file.id == mapping.id) {
            Some(file) => file.code.extend(mapping.code),
            None => files.push(mapping),
        }
    }
    files
}

fn parse_line(line: &[u8]) -> Option<MappedFile> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let range = text()?.to_owned();
    let permissions = text()?;
    let offset = text()?;
    let device = text()?.to_owned();
    let inode: u64 = text()?.parse().ok()?;
    let path = fields.next()?.trim_ascii_start();
    if inode == 0 || !path.starts_with(b"/") {
        return None;
    }
    let (path, deleted) = match path.strip_suffix(DELETED) {
        Some(path) => (path, true),
        None => (path, false),
    };
    Some(MappedFile {
        id: FileId { device, inode },
        path: OsString::from_vec(path.to_vec()).into(),
        deleted,
        code: if permissions.contains('x') {
            vec![Code::parse(&range, offset)?]
        } else {
            Vec::new()
        },
        range,
    })
}

impl Code {
    fn parse(range: &str, offset: &str) -> Option<Self> {
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = range.split_once('-')?;
        Some(Self {
            offset: number(offset)?,
            addresses: number(start)?..number(end)?,
        })
    }
}

/// Reads the memory of a process.
///
/// # Errors
/// When it is gone, nothing is mapped there, or we may not look.
pub fn read_memory(pid: u32, address: u64, into: &mut [u8]) -> io::Result<()> {
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(into, address)
}

/// The executable of a process, as the process sees it.
pub fn executable(pid: u32) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe"))
}

/// Name of a process' main thread, fit for a terminal.
pub fn name(pid: u32) -> io::Result<String> {
    let name = fs::read(format!("/proc/{pid}/comm"))?;
    Ok(printable(OsStr::from_bytes(name.trim_ascii_end()).as_ref()))
}

/// Arguments a process was started with (it can have changed them).
pub fn command_line(pid: u32) -> io::Result<Vec<OsString>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"))?;
    // It has ended, and nobody has asked how.
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    Ok(bytes
        .split(|byte| *byte == 0)
        .map(|argument| OsString::from_vec(argument.to_vec()))
        .collect())
}

/// The model a command line names: the last one, as llama.cpp takes it (`parse_cli_args` in
/// common/arg.cpp, which knows no `--model=FILE`).
pub fn model_argument(arguments: &[OsString]) -> Option<&OsStr> {
    last_value(arguments, &["-m", "--model"])
}

/// The draft model that a command line of llama.cpp's programs names.
pub fn draft_argument(arguments: &[OsString]) -> Option<&OsStr> {
    last_value(arguments, &["-md", "--model-draft", "--spec-draft-model"])
}

/// An option as llama.cpp's programs understand it: in long names they take `_` for `-` (common/arg.cpp).
pub fn option_name(word: &str) -> Cow<'_, str> {
    match word.starts_with("--") && word.contains('_') {
        true => word.replace('_', "-").into(),
        false => word.into(),
    }
}

fn last_value<'a>(arguments: &'a [OsString], names: &[&str]) -> Option<&'a OsStr> {
    let mut pairs = arguments.windows(2).rev();
    pairs.find_map(|pair| {
        let is_name = pair[0]
            .to_str()
            .is_some_and(|word| names.contains(&&*option_name(word)));
        is_name.then_some(pair[1].as_os_str())
    })
}

/// What a process can open: its rights to files, and where its paths begin.
#[derive(Debug)]
pub struct Reach {
    account: Account,
    root: File,
    directory: File,
}

impl Reach {
    /// That of a process; none when it is gone, or hidden from us.
    pub fn of(pid: u32) -> Option<Self> {
        let status = fs::read(format!("/proc/{pid}/status")).ok()?;
        let account = account(&String::from_utf8_lossy(&status))?;
        let place = |name| open_place(Path::new(&format!("/proc/{pid}/{name}"))).ok();
        Some(Self {
            account,
            root: place("root")?,
            directory: place("cwd")?,
        })
    }

    /// That of a process that this account starts from here.
    ///
    /// # Errors
    /// When our own place cannot be opened.
    pub fn of_account(account: Account) -> io::Result<Self> {
        Ok(Self {
            account,
            root: open_place(Path::new("/"))?,
            directory: open_place(Path::new("."))?,
        })
    }

    /// Opens a regular file by the name that the process has for it, if the process could read it.
    /// Who names a file has not shown that; we could read any.
    ///
    /// # Errors
    /// When it could not, or it is no regular file.
    pub fn open(&self, name: &Path) -> io::Result<File> {
        self.account.with_rights(|| {
            let place = OFlag::O_PATH | OFlag::O_CLOEXEC;
            let how = OpenHow::new().flags(place);
            let place = if name.is_absolute() {
                // Links in another root directory than ours lead to places below it.
                openat2(&self.root, name, how.resolve(ResolveFlag::RESOLVE_IN_ROOT))?
            } else {
                openat2(&self.directory, name, how)?
            };
            read_regular(&place.into())
        })
    }
}

/// Whose rights to files a process has, by its `status`: the last of four ids is the one that counts.
/// Its groups are its own, and not those of its user's next login.
fn account(status: &str) -> Option<Account> {
    let numbers = |key: &str| -> Option<Vec<u32>> {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace()
            .map(|word| word.parse().ok())
            .collect()
    };
    let uid = Uid::from_raw(*numbers("Uid:")?.get(3)?);
    let gid = Gid::from_raw(*numbers("Gid:")?.get(3)?);
    let groups = numbers("Groups:")?.into_iter().map(Gid::from_raw);
    Some(Account {
        groups: groups.collect(),
        ..Account::by_ids(uid, gid).ok()?
    })
}

/// A variable of the environment a process was started with.
pub fn variable(pid: u32, name: &str) -> Option<OsString> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    environment.split(|byte| *byte == 0).find_map(|variable| {
        let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        Some(OsString::from_vec(value.to_vec()))
    })
}

/// The environment a process was started with; empty when we may not look.
pub fn environment(pid: u32) -> Environment {
    Environment::parse(&fs::read(format!("/proc/{pid}/environ")).unwrap_or_default())
}

/// The root directory of a process.
pub fn root(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
}

/// Whether there is a file from which llama.cpp's programs take options besides their arguments
/// (`common_params_apply_system_config` in common/arg.cpp, by b11434), or may be one, for a program with
/// this root directory and these variables.
pub fn has_config_file<'a>(root: &Path, variable: impl Fn(&str) -> Option<&'a OsStr>) -> bool {
    const FILE: &str = "llama.cpp/config.ini";
    let set = |name| variable(name).filter(|value| !value.is_empty());
    let of_user = set("XDG_CONFIG_HOME").map(PathBuf::from);
    let of_user = of_user.or_else(|| Some(Path::new(set("HOME")?).join(".config")));
    let exists = |directory: &Path| {
        let inside = directory.strip_prefix("/");
        // Of a relative path, it takes the working directory to tell.
        inside.map_or(true, |inside| root.join(inside).join(FILE).exists())
    };
    // Without a home, the account's is looked up.
    exists(Path::new("/etc")) || of_user.is_none_or(|directory| exists(&directory))
}

/// A path of the target's choosing, fit for a terminal: control characters replaced.
pub fn printable(path: &Path) -> String {
    path.to_string_lossy().replace(char::is_control, "\u{fffd}")
}

/// Opens a regular file for reading. Anything else is refused without opening it: that can block, and
/// has effects on devices and on who waits at the other end of a FIFO.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    read_regular(&open_place(path)?)
}

/// Opens what was found with `O_PATH`, which is no more than its place, for reading.
///
/// # Errors
/// When it is no regular file, or not ours to read.
pub fn read_regular(place: &File) -> io::Result<File> {
    if !place.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "is no regular file",
        ));
    }
    // By its own descriptor, since the path can lead elsewhere by now. Somebody's lease on the file
    // (fcntl(2), F_SETLEASE) must not block us.
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

fn open_place(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
}

/// The interpreter that a script names in its first line (fs/binfmt_script.c).
pub fn script_interpreter(file: &File) -> Option<PathBuf> {
    let mut start = [0; 256];
    let length = file.read_at(&mut start, 0).ok()?;
    let line = start[..length].strip_prefix(b"#!")?;
    let interpreter = line
        .split(|byte| *byte == b'\n')
        .next()?
        .trim_ascii_start()
        .split(|byte| byte.is_ascii_whitespace())
        .next()?;
    Some(OsStr::from_bytes(interpreter).into())
}

/// The process that a thread belongs to, in our PID namespace.
pub fn process_of(thread: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    process.trim().parse().ok()
}

/// Whether a process is stopped by a signal (`T` in `/proc/PID/stat`).
pub fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, can hold anything.
    stat.rsplit_once(") ")
        .is_some_and(|(_, fields)| fields.starts_with('T'))
}

/// Whether a process whose main thread has ended has another thread that is not ending, too.
pub fn goes_on_without_its_main_thread(pid: u32) -> bool {
    other_thread(pid).is_some()
}

/// A thread by which `/proc` shows the memory of a process: the main one, or another one when that has
/// ended and others go on.
pub fn thread_with_memory(pid: u32) -> u32 {
    let main = PathBuf::from(format!("/proc/{pid}/task/{pid}"));
    match is_going_on(&main) {
        Some(false) => other_thread(pid).unwrap_or(pid),
        _ => pid,
    }
}

/// A thread that is not the main one, and not ending.
fn other_thread(pid: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let mut tasks = tasks.flatten().map(|task| task.path());
    tasks.find_map(|task| {
        let thread = task.file_name()?.to_str()?.parse().ok()?;
        (thread != pid && is_going_on(&task)?).then_some(thread)
    })
}

/// Whether a thread is neither exiting nor about to be killed, as all are when a process exits
/// (`zap_other_threads` in kernel/signal.c).
fn is_going_on(task: &Path) -> Option<bool> {
    const PF_EXITING: u32 = 4;
    const SIGKILL_PENDING: u64 = 1 << (libc::SIGKILL - 1);
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    let status = fs::read_to_string(task.join("status")).ok()?;
    // The name, in parentheses, can hold anything; the flags are the seventh field after it.
    let (_, fields) = stat.rsplit_once(") ")?;
    let flags: u32 = fields.split(' ').nth(6)?.parse().ok()?;
    let pending = status
        .lines()
        .find_map(|line| line.strip_prefix("SigPnd:"))?;
    let pending = u64::from_str_radix(pending.trim(), 16).ok()?;
    Some(flags & PF_EXITING == 0 && pending & SIGKILL_PENDING == 0)
}

/// Whether a file begins as a GGUF file does.
pub fn is_gguf(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"GGUF"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{fs::PermissionsExt as _, process::CommandExt as _};

    #[test]
    fn options_in_files_are_looked_for_where_the_program_does() {
        let root = tempfile::tempdir().unwrap();
        let has = |variables: &[(&str, &'static str)]| {
            has_config_file(root.path(), |name| {
                let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
                Some(OsStr::new(*value))
            })
        };
        let write = |directory: &str| {
            let directory = root.path().join(directory).join("llama.cpp");
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("config.ini"), "[*]\n").unwrap();
        };
        assert!(!has(&[("HOME", "/home/u")]));
        assert!(has(&[]) && has(&[("XDG_CONFIG_HOME", "relative")]));
        write("home/u/.config");
        assert!(has(&[("HOME", "/home/u")]));
        assert!(!has(&[("HOME", "/home/u"), ("XDG_CONFIG_HOME", "/cfg")]));
        write("cfg");
        assert!(has(&[("HOME", "/home/u"), ("XDG_CONFIG_HOME", "/cfg")]));
        write("etc");
        assert!(has(&[("HOME", "/nobody")]));
    }

    #[test]
    fn lines_of_real_processes() {
        let maps = b"\
55d0c0a00000-55d0c0a21000 r--p 00000000 fe:00 1311 /opt/llama cpp/bin/llama-cli
55d0c0a21000-55d0c0b00000 r-xp 00021000 fe:00 1311 /opt/llama cpp/bin/llama-cli
7f3a00000000-7f3a00021000 rw-p 00000000 00:00 0 
7f3a10000000-7f3a11000000 r--p 00000000 fe:00 77 /models/a.gguf
7f3a20000000-7f3a20010000 r-xp 00001000 fe:00 90 /tmp/libggml-cpu.so (deleted)
7f3a30000000-7f3a30001000 rw-s 00000000 00:01 2049 /memfd:ggml (deleted)
7f3a30002000-7f3a30003000 r-xp 00000000 fe:00 91 /tmp/\xff\xfe.so
7ffd5a000000-7ffd5a021000 rw-p 00000000 00:00 0 [stack]
7ffd5a0f6000-7ffd5a0f8000 r-xp 00000000 00:00 0 [vdso]
";
        let files = parse_maps(maps);
        let seen: Vec<_> = files
            .iter()
            .map(|file| {
                (
                    file.path.to_string_lossy().into_owned(),
                    file.id.inode,
                    file.is_executable(),
                    file.deleted,
                )
            })
            .collect();
        let row =
            |path: &str, inode, executable, deleted| (path.to_owned(), inode, executable, deleted);
        assert_eq!(
            seen,
            [
                row("/opt/llama cpp/bin/llama-cli", 1311, true, false),
                row("/models/a.gguf", 77, false, false),
                row("/tmp/libggml-cpu.so", 90, true, true),
                row("/memfd:ggml", 2049, false, true),
                row("/tmp/\u{fffd}\u{fffd}.so", 91, true, false),
            ]
        );
        assert_eq!(files[0].range, "55d0c0a00000-55d0c0a21000");
    }

    #[test]
    fn garbage_is_passed_over() {
        for line in ["", "x", "1-2 r-xp", "1-2 r-xp 0 0:0 nine /x", "\u{0}\u{0}"] {
            assert_eq!(parse_maps(line.as_bytes()), []);
        }
    }

    #[test]
    fn terminals_get_no_control_characters() {
        let path = Path::new("/m/\u{1b}[2Ja\n\u{9b}b.gguf");
        assert_eq!(printable(path), "/m/\u{fffd}[2Ja\u{fffd}\u{fffd}b.gguf");
    }

    #[test]
    fn the_last_model_is_the_one() {
        let named = |line: &str| {
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            model_argument(&arguments).map(OsStr::to_owned)
        };
        assert_eq!(named("llama -m a -t 4"), Some("a".into()));
        assert_eq!(named("llama -m a --model b -c 1"), Some("b".into()));
        assert_eq!(named("llama --model b -p x -m a"), Some("a".into()));
        assert_eq!(named("llama --model=a"), None);
        let words = ["llama", "--model_draft", "a"].map(OsString::from);
        assert_eq!(draft_argument(&words), Some("a".as_ref()));
        assert_eq!(named("llama -p x"), None);
        assert_eq!(named("-m"), None);
    }

    /// Who waits to write to a FIFO goes on waiting, and nobody is taken for a reader.
    #[test]
    fn what_is_no_file_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (opened, has_opened) = std::sync::mpsc::channel();
        let path = pipe.clone();
        let writer = std::thread::spawn(move || {
            let pipe = OpenOptions::new().write(true).open(path);
            opened.send(()).unwrap();
            io::Write::write_all(&mut pipe.unwrap(), b"x").unwrap();
        });
        let wait = std::time::Duration::from_millis(100);
        has_opened.recv_timeout(wait).unwrap_err();
        let refused = |path: &Path| {
            let error = open_regular(path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        };
        refused(&pipe);
        has_opened.recv_timeout(wait).unwrap_err();
        assert_eq!(fs::read(&pipe).unwrap(), b"x");
        writer.join().unwrap();
        refused(Path::new("/dev/null"));
        refused(directory.path());
    }

    #[test]
    fn names_reach_what_the_process_can_read() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("not tested: needs root");
        }
        let directory = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(directory.path(), 0o755);
        for (name, allowed) in [("open", 0o644), ("secret", 0o600)] {
            let path = directory.path().join(name);
            fs::write(&path, name).unwrap();
            mode(&path, allowed);
        }
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::all()).unwrap();
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .current_dir(directory.path())
            .uid(54321)
            .gid(54321)
            .spawn()
            .unwrap();
        let reach = Reach::of(child.id()).unwrap();
        let kind = |name: &Path| reach.open(name).map_err(|error| error.kind()).map(drop);
        for place in [Path::new(""), directory.path()] {
            assert_eq!(kind(&place.join("open")), Ok(()));
            let secret = kind(&place.join("secret"));
            assert_eq!(secret, Err(io::ErrorKind::PermissionDenied));
            assert_eq!(kind(&place.join("pipe")), Err(io::ErrorKind::InvalidInput));
        }
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(Reach::of(child.id()).is_none());
    }

    #[test]
    fn ids_of_a_status() {
        let status = "Name:\tUid:\nUid:\t1\t2\t3\t54321\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n";
        let account = account(status).unwrap();
        let groups = [9, 10].map(Gid::from_raw);
        assert_eq!(account.uid, Uid::from_raw(54321));
        assert_eq!(
            (account.gid, account.groups),
            (Gid::from_raw(8), groups.to_vec())
        );
        assert!(super::account("Uid:\t1\n").is_none());
    }

    #[test]
    fn own_maps_hold_own_executable() {
        let own = std::process::id();
        let exe = executable(own).unwrap();
        let files = mapped_files(own).unwrap();
        let file = files.iter().find(|file| file.path == exe).unwrap();
        assert!(file.is_executable());
        assert_eq!(
            fs::read(file.reachable_path(own)).unwrap(),
            fs::read(exe).unwrap()
        );
    }
}
