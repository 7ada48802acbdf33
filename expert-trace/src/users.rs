//! Which processes map a file.

use std::{
    fs::{self, File},
    io,
    num::NonZeroU32,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{
    same_file::FirstPage,
    target::{self, open_regular},
};

/// What a look at all processes has shown.
#[derive(Debug, Default)]
pub struct Users {
    /// Processes that map the file as code, ascending.
    pub pids: Vec<NonZeroU32>,
    /// Processes that may not be looked at, ascending.
    pub hidden: Vec<u32>,
    /// How many were looked at.
    pub looked_at: usize,
    /// Processes that map another file of the same name.
    pub namesakes: Vec<Namesake>,
}

/// A process that maps another file of the same name.
#[derive(Debug)]
pub struct Namesake {
    /// The process.
    pub pid: u32,
    /// The file's path, as the process sees it.
    pub path: PathBuf,
    /// Its path here.
    pub reachable: PathBuf,
    /// Whether it has been deleted or replaced since.
    pub deleted: bool,
}

/// Looks for the processes that map `file`, by whatever name. `path` is the one that we have for it.
///
/// # Errors
/// When there is no list of processes.
pub fn of(file: &File, path: &Path) -> io::Result<Users> {
    let own = std::process::id();
    let mut pids: Vec<NonZeroU32> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &NonZeroU32| pid.get() != own)
        .collect();
    pids.sort_unstable();
    let wanted = Wanted {
        metadata: file.metadata()?,
        page: FirstPage::of(file).ok(),
    };
    let mut users = Users::default();
    for pid in pids {
        let files = match target::mapped_files(pid.get()) {
            Ok(files) => files,
            Err(error) => {
                if error.kind() == io::ErrorKind::PermissionDenied {
                    users.hidden.push(pid.get());
                }
                continue;
            }
        };
        users.looked_at += 1;
        let mut code = files.iter().filter(|file| file.is_executable());
        if code.any(|mapped| wanted.is_at(&mapped.reachable_path(pid.get()))) {
            users.pids.push(pid);
        } else if let Some(other) = files
            .iter()
            .find(|mapped| mapped.is_executable() && mapped.path.file_name() == path.file_name())
        {
            users.namesakes.push(Namesake {
                pid: pid.get(),
                path: other.path.clone(),
                reachable: match other.deleted {
                    true => other.reachable_path(pid.get()),
                    false => target::in_root(pid.get(), &other.path),
                },
                deleted: other.deleted,
            });
        }
    }
    Ok(users)
}

/// A file that is looked for.
struct Wanted {
    metadata: fs::Metadata,
    page: Option<FirstPage>,
}

impl Wanted {
    fn is_at(&self, path: &Path) -> bool {
        let Ok(metadata) = fs::metadata(path) else {
            return false;
        };
        let name = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
        if name(&metadata) == name(&self.metadata) {
            return true;
        }
        // Two containers of one image see one file by different devices.
        metadata.size() == self.metadata.size()
            && self.page.as_ref().is_some_and(|page| {
                let other = open_regular(path).and_then(|other| FirstPage::of(&other));
                other.is_ok_and(|other| page.is(&other) == Some(true))
            })
    }
}
