//! The fingerprint of what an object is built from: both crates and the [recipe](super::recipe).

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use super::recipe;
use crate::cache::sha256_hex;

/// Files and directories, relative to the workspace; those that are not there do not count.
const SOURCES: [&str; 7] = [
    "expert-trace-common/Cargo.toml",
    "expert-trace-common/src",
    "expert-trace-ebpf/.cargo",
    "expert-trace-ebpf/Cargo.lock",
    "expert-trace-ebpf/Cargo.toml",
    "expert-trace-ebpf/build.rs",
    "expert-trace-ebpf/src",
];

/// Hash of the relative paths and contents of all sources, and of the recipe.
pub fn fingerprint(root: &Path, architecture: &str) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(root, source, &mut files)?;
    }
    files.sort();
    let mut all = Vec::new();
    append(&mut all, recipe::line(architecture).as_bytes());
    for file in files {
        let path = root.join(&file);
        let contents =
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        append(&mut all, file.as_bytes());
        append(&mut all, &contents);
    }
    Ok(sha256_hex(&all))
}

/// Lengths tell where one field ends and the next begins.
fn append(all: &mut Vec<u8>, field: &[u8]) {
    all.extend((field.len() as u64).to_le_bytes());
    all.extend(field);
}

fn collect(root: &Path, source: &str, files: &mut Vec<String>) -> Result<()> {
    let path = root.join(source);
    let metadata = match fs::metadata(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.with_context(|| format!("cannot look at {}", path.display()))?,
    };
    if !metadata.is_dir() {
        files.push(source.to_owned());
        return Ok(());
    }
    let entries = fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for entry in entries {
        let name = entry?.file_name();
        collect(root, &format!("{source}/{}", name.to_string_lossy()), files)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    struct Tree(PathBuf);

    impl Tree {
        fn new(test: &str) -> Self {
            let root = std::env::temp_dir().join(format!("xtask-{}-{test}", std::process::id()));
            let tree = Self(root);
            tree.write("expert-trace-ebpf/Cargo.toml", "[package]");
            tree.write("expert-trace-ebpf/src/main.rs", "mod rows;");
            tree.write("expert-trace-common/src/lib.rs", "");
            tree
        }

        fn write(&self, file: &str, contents: &str) {
            let path = self.0.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }

        fn fingerprint(&self) -> String {
            fingerprint(&self.0, "x86_64").unwrap()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn it_depends_on_the_sources_and_not_on_where_they_are() {
        let (here, there) = (Tree::new("here"), Tree::new("there"));
        assert_eq!(here.fingerprint(), there.fingerprint());
        there.write("expert-trace-ebpf/src/main.rs", "mod pass;");
        assert_ne!(here.fingerprint(), there.fingerprint());
    }

    #[test]
    fn new_and_renamed_files_change_it() {
        let tree = Tree::new("files");
        let before = tree.fingerprint();
        tree.write("expert-trace-ebpf/src/a/b.rs", "");
        let added = tree.fingerprint();
        assert_ne!(added, before);
        let source = tree.0.join("expert-trace-ebpf/src");
        fs::rename(source.join("a/b.rs"), source.join("a/c.rs")).unwrap();
        assert_ne!(tree.fingerprint(), added);
    }

    #[test]
    fn build_products_do_not_change_it() {
        let tree = Tree::new("products");
        let before = tree.fingerprint();
        tree.write("expert-trace-ebpf/target/debug/out", "built");
        assert_eq!(tree.fingerprint(), before);
    }

    #[test]
    fn architectures_have_their_own() {
        let tree = Tree::new("architectures");
        assert_ne!(tree.fingerprint(), fingerprint(&tree.0, "aarch64").unwrap());
    }
}
