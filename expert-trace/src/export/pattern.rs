//! Names of outputs that name a process: `%p` is its id, `%%` a percent sign. What else follows a
//! percent sign stays as it is.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

/// The name of a process' file.
pub fn of_process(pattern: &Path, pid: u32) -> PathBuf {
    expand(pattern, |name| name.extend(pid.to_string().bytes()))
}

/// Whether the files of two processes have different names.
pub fn tells_processes_apart(pattern: &Path) -> bool {
    let mut tells = false;
    expand(pattern, |_| tells = true);
    tells
}

fn expand(pattern: &Path, mut process: impl FnMut(&mut Vec<u8>)) -> PathBuf {
    let mut name = Vec::new();
    let mut bytes = pattern.as_os_str().as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.peek()) {
            (b'%', Some(b'p')) => {
                bytes.next();
                process(&mut name);
            }
            (b'%', Some(b'%')) => {
                bytes.next();
                name.push(b'%');
            }
            _ => name.push(byte),
        }
    }
    OsString::from_vec(name).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (pattern, expected, tells) in [
            ("stats.json", "stats.json", false),
            ("stats-%p.json", "stats-42.json", true),
            ("/runs/%p/%p", "/runs/42/42", true),
            ("100%.json", "100%.json", false),
            ("%%p", "%p", false),
            ("%%%p", "%42", true),
            ("%d%", "%d%", false),
            ("", "", false),
        ] {
            let pattern = Path::new(pattern);
            assert_eq!(of_process(pattern, 42), Path::new(expected));
            assert_eq!(tells_processes_apart(pattern), tells, "{expected}");
        }
    }
}
