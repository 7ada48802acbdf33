use super::{inherited::descriptor, *};
use nix::{
    sys::stat::Mode,
    unistd::{Gid, Uid, geteuid, mkfifo, pipe},
};
use std::{
    fs,
    io::Read as _,
    os::{
        fd::{AsFd as _, AsRawFd as _, RawFd},
        unix::{
            fs::{PermissionsExt as _, chown, symlink},
            net::UnixStream,
        },
    },
};

fn ours() -> Account {
    Account::current().unwrap()
}

/// Somebody with a directory, beside one of root's. None when we are not root.
fn stranger() -> Option<(Account, tempfile::TempDir, tempfile::TempDir)> {
    if !geteuid().is_root() {
        eprintln!("not tested: needs root");
        return None;
    }
    const ID: u32 = 54321;
    let account = Account::by_ids(Uid::from_raw(ID), Gid::from_raw(ID)).unwrap();
    let theirs = tempfile::tempdir().unwrap();
    chown(theirs.path(), Some(ID), Some(ID)).unwrap();
    let roots = tempfile::tempdir().unwrap();
    fs::set_permissions(roots.path(), fs::Permissions::from_mode(0o755)).unwrap();
    Some((account, theirs, roots))
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    entries.map(|entry| name(entry.unwrap())).collect()
}

#[test]
fn a_file_appears_when_it_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stats.json");
    let output = Output::create(&path, &ours()).unwrap();
    assert!(!path.exists());
    output.write_json(&[1, 2]).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "[\n  1,\n  2\n]\n");
    assert_eq!(names(directory.path()), ["stats.json"]);
}

#[test]
fn nothing_is_left_behind_when_it_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stats.json");
    let output = Output::create(&path, &ours()).unwrap();
    drop(output);
    assert!(names(directory.path()).is_empty());

    let output = with_named_draft(&path);
    assert_eq!(names(directory.path()).len(), 1);
    drop(output);
    assert!(names(directory.path()).is_empty());
}

/// As on a file system that has no files without names.
fn with_named_draft(path: &Path) -> Output {
    let Ok(Found::File(location)) = find(path) else {
        panic!("{path:?}");
    };
    let draft = Draft::named(&location).unwrap();
    Output {
        place: Place::Atomic { location, draft },
        account: ours(),
    }
}

fn open_log(path: &Path, account: &Account) -> io::Result<LogFile> {
    LogFile::open(path, account, None)
}

#[test]
fn files_are_replaced_whatever_the_draft() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stats.json");
    for existing in [false, true] {
        let outputs: [fn(&Path) -> Output; 2] = [with_named_draft, |path| {
            let output = Output::create(path, &ours()).unwrap();
            let Place::Atomic { draft, .. } = &output.place else {
                panic!("{output:?}");
            };
            assert_eq!(draft.name, None, "needs a file system with O_TMPFILE");
            output
        }];
        for create in outputs {
            let _ = fs::remove_file(&path);
            if existing {
                fs::write(&path, "old").unwrap();
            }
            let output = create(&path);
            assert_eq!(path.exists(), existing);
            output.write_json(&1).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
            assert_eq!(names(directory.path()), ["stats.json"]);
        }
    }
    // What has come meanwhile is replaced, too, and a directory is not.
    fs::remove_file(&path).unwrap();
    let (first, second) = (
        Output::create(&path, &ours()).unwrap(),
        Output::create(&path, &ours()).unwrap(),
    );
    fs::write(&path, "new").unwrap();
    first.write_json(&1).unwrap();
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let saved = second.write_json(&2).unwrap_err().saved.unwrap();
    fs::remove_file(saved).unwrap();
    assert_eq!(names(directory.path()), ["stats.json"]);
}

#[test]
fn permissions_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stats.json");
    for mode in [0o600, 0o640, 0o666, 0o755] {
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let output = Output::create(&path, &ours()).unwrap();
        output.write_json(&1).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
    }
    // As the umask has it for any file.
    let usual = directory.path().join("usual");
    fs::write(&usual, "").unwrap();
    fs::remove_file(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode();
    for create in [with_named_draft, |path: &Path| {
        Output::create(path, &ours()).unwrap()
    }] {
        create(&path).write_json(&1).unwrap();
        assert_eq!(mode(&path), mode(&usual));
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_file_in_a_sticky_directory_stays_its_owners() {
    let Some((account, theirs, roots)) = stranger() else {
        return;
    };
    let all = fs::Permissions::from_mode(0o1777);
    fs::set_permissions(roots.path(), all).unwrap();
    let file = roots.path().join("file");
    fs::write(&file, "kept").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    let error = Output::create(&file, &account).unwrap_err();
    assert!(error.to_string().contains("is sticky"), "{error}");
    Output::create(&file, &ours()).unwrap();
    let own = roots.path().join("own");
    Output::create(&own, &account)
        .unwrap()
        .write_json(&1)
        .unwrap();
    Output::create(&own, &account)
        .unwrap()
        .write_json(&2)
        .unwrap();
    assert_eq!(fs::read_to_string(&own).unwrap(), "2\n");
    drop(theirs);
}

#[test]
fn one_file_for_both_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let both = |output: &Path, log: &Path| {
        let output = Output::create(output, &ours()).unwrap();
        LogFile::open(log, &ours(), Some(&output)).map(drop)
    };
    let refused = |output: &Path, log: &Path| {
        let error = both(output, log).unwrap_err().to_string();
        assert!(error.contains("one file"), "{error}");
    };
    refused(&path("new"), &path("new"));
    refused(&path("new"), &path("./new"));
    symlink(directory.path(), path("here")).unwrap();
    refused(&path("new"), &path("here/new"));
    assert!(!path("new").exists());
    fs::write(path("file"), "kept").unwrap();
    fs::hard_link(path("file"), path("hard")).unwrap();
    symlink("file", path("soft")).unwrap();
    for (output, log) in [("file", "file"), ("soft", "file"), ("file", "hard")] {
        refused(&path(output), &path(log));
    }
    assert_eq!(fs::read_to_string(path("file")).unwrap(), "kept");
    both(&path("new"), &path("file")).unwrap();
    let null = Path::new("/dev/null");
    both(null, null).unwrap();
}

#[test]
fn what_nobody_gave_us_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let path = format!("/dev/fd/{}", file.as_raw_fd());
    let error = inherited(Path::new(&path), &Inherited::default()).unwrap_err();
    assert!(error.to_string().contains("is not open"), "{error}");
    let open = Inherited::open_now().unwrap();
    assert!(open.has(file.as_raw_fd()) && open.has(2));
    assert!(inherited(Path::new(&path), &open).unwrap().is_some());
}

#[test]
fn bad_places_are_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let dangling = directory.path().join("dangling");
    symlink("nowhere", &dangling).unwrap();
    let missing = directory.path().join("no/such/file");
    for path in [directory.path(), &missing, &dangling] {
        assert!(Output::create(path, &ours()).is_err(), "{path:?}");
    }
    let file = directory.path().join("file");
    fs::write(&file, "kept").unwrap();
    let in_file = directory.path().join("file/x/y");
    let with_slash = directory.path().join("file/");
    let nothing = directory.path().join("nodir/");
    let dot = directory.path().join("nodir/.");
    let long = directory.path().join("x".repeat(256));
    for (path, reason) in [
        (directory.path(), "is a directory"),
        (&missing, "create it first"),
        (&dangling, "is a link to nowhere"),
        (&in_file, "file is no directory"),
        (&with_slash, "file is no directory"),
        (&nothing, "names a directory"),
        (&dot, "names a directory"),
        (&long, "too long"),
        (Path::new(""), "is empty"),
    ] {
        let output = Output::create(path, &ours()).unwrap_err().to_string();
        assert!(output.contains(reason), "{path:?}: {output}");
        let log = open_log(path, &ours()).unwrap_err().to_string();
        assert_eq!(log, output);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
    for (path, reason) in [
        ("-", "/dev/fd/"),
        ("/dev/fd/1000000", "is not open"),
        ("/proc/self/fd/1000000", "is not open"),
    ] {
        let output = Output::create(Path::new(path), &ours()).unwrap_err();
        let log = open_log(Path::new(path), &ours()).unwrap_err();
        assert!(output.to_string().contains(reason), "{output}");
        assert_eq!(output.to_string(), log.to_string());
    }
}

#[test]
fn devices_are_written_in_place() {
    let output = Output::create(Path::new("/dev/null"), &ours()).unwrap();
    assert!(matches!(output.place, Place::Special(_)));
    output.write_json(&1).unwrap();
}

#[test]
fn symbolic_links_are_followed_and_hard_ones_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("file"), "old").unwrap();
    fs::hard_link(path("file"), path("hard")).unwrap();
    symlink("file", path("soft")).unwrap();
    let output = Output::create(&path("soft"), &ours()).unwrap();
    output.write_json(&1).unwrap();
    assert!(path("soft").is_symlink());
    assert_eq!(fs::read_to_string(path("file")).unwrap(), "1\n");
    assert_eq!(fs::read_to_string(path("hard")).unwrap(), "old");
}

#[test]
fn descriptors_are_copied() {
    let copy = |number: RawFd| {
        let path = format!("/proc/self/fd/{number}");
        inherited(Path::new(&path), &Inherited(vec![number]))
    };
    let in_place = |number| Output {
        place: Place::Special(copy(number).unwrap().unwrap()),
        account: ours(),
    };
    let (reader, writer) = pipe().unwrap();
    let output = in_place(writer.as_raw_fd());
    drop(writer);
    output.write_json(&1).unwrap();
    let mut text = String::new();
    File::from(reader.as_fd().try_clone_to_owned().unwrap())
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "1\n");

    let error = copy(reader.as_raw_fd()).unwrap_err();
    assert!(error.to_string().contains("for writing"), "{error}");

    let (mut here, there) = UnixStream::pair().unwrap();
    let output = in_place(there.as_raw_fd());
    drop(there);
    output.write_json(&2).unwrap();
    text.clear();
    here.read_to_string(&mut text).unwrap();
    assert_eq!(text, "2\n");
}

#[test]
fn paths_of_descriptors() {
    for (path, expected) in [
        ("/dev/stdin", Some(0)),
        ("/dev/stdout", Some(1)),
        ("/dev/stderr", Some(2)),
        ("/dev/fd/63", Some(63)),
        ("/dev//fd/./63", Some(63)),
        ("/proc/self/fd/4", Some(4)),
        ("/dev/fd/-1", None),
        ("/dev/fd/x", None),
        ("/dev/fd/99999999999", None),
        ("/dev/fd", None),
        ("2", None),
    ] {
        assert_eq!(descriptor(Path::new(path)), expected, "{path}");
    }
}

#[test]
fn a_fifo_waits_for_its_reader() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    let from = path.clone();
    let reader = std::thread::spawn(move || fs::read_to_string(from).unwrap());
    let output = Output::create(&path, &ours()).unwrap();
    output.write_json(&1).unwrap();
    assert_eq!(reader.join().unwrap(), "1\n");
    assert_eq!(names(directory.path()), ["fifo"]);
}

#[test]
fn logs_are_emptied_and_written_in_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    fs::write(&path, "old and long").unwrap();
    let log = open_log(&path, &ours()).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "old and long");
    log.begin().unwrap();
    log.writer().unwrap().write_all(b"new").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    open_log(Path::new("/dev/null"), &ours())
        .unwrap()
        .begin()
        .unwrap();
}

#[test]
fn what_cannot_be_written_is_saved() {
    let directory = tempfile::tempdir().unwrap();
    let removed = Output::create(&directory.path().join("file"), &ours()).unwrap();
    directory.close().unwrap();
    let full = Output::create(Path::new("/dev/full"), &ours()).unwrap();
    for (output, kind) in [
        (removed, io::ErrorKind::NotFound),
        (full, io::ErrorKind::StorageFull),
    ] {
        let error = output.write_json(&1).unwrap_err();
        assert_eq!(error.error.kind(), kind);
        let text = error.to_string();
        let path = error.saved.unwrap();
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn files_belong_to_the_account() {
    let Some((account, theirs, _)) = stranger() else {
        return;
    };
    let owner = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid())
    };
    let expected = (account.uid.as_raw(), account.gid.as_raw());
    let (stats, log) = (theirs.path().join("stats"), theirs.path().join("log"));
    let output = Output::create(&stats, &account).unwrap();
    output.write_json(&1).unwrap();
    assert_eq!(owner(&stats), expected);
    open_log(&log, &account).unwrap();
    assert_eq!(owner(&log), expected);

    let full = Output::create(Path::new("/dev/full"), &account).unwrap();
    let saved = full.write_json(&1).unwrap_err().saved.unwrap();
    assert_eq!(owner(&saved), expected);
    fs::remove_file(saved).unwrap();
}

#[test]
fn what_the_account_may_not_write_is_refused() {
    let Some((account, theirs, roots)) = stranger() else {
        return;
    };
    let victim = roots.path().join("victim");
    fs::write(&victim, "kept").unwrap();
    let (soft, hard) = (theirs.path().join("soft"), theirs.path().join("hard"));
    symlink(&victim, &soft).unwrap();
    fs::hard_link(&victim, &hard).unwrap();
    for path in [&soft, &hard, &victim, &roots.path().join("new")] {
        let output = Output::create(path, &account).unwrap_err();
        assert_eq!(output.kind(), io::ErrorKind::PermissionDenied, "{path:?}");
        let log = open_log(path, &account).unwrap_err();
        assert_eq!(log.kind(), io::ErrorKind::PermissionDenied, "{path:?}");
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
    assert_eq!(names(roots.path()), ["victim"]);
}

#[test]
fn a_directory_that_becomes_a_link_leads_nowhere() {
    let Some((account, theirs, roots)) = stranger() else {
        return;
    };
    let victim = roots.path().join("stats");
    fs::write(&victim, "kept").unwrap();
    let directory = theirs.path().join("directory");
    fs::create_dir(&directory).unwrap();
    chown(&directory, Some(account.uid.as_raw()), None).unwrap();
    let output = Output::create(&directory.join("stats"), &account).unwrap();
    // Whoever owns the directory above can do so meanwhile.
    let moved = theirs.path().join("moved");
    fs::rename(&directory, &moved).unwrap();
    symlink(roots.path(), &directory).unwrap();

    output.write_json(&1).unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "kept");
    assert_eq!(names(roots.path()), ["stats"]);
    assert_eq!(fs::read_to_string(moved.join("stats")).unwrap(), "1\n");
}

#[test]
fn a_right_that_is_lost_meanwhile_is_not_used() {
    let Some((account, theirs, _)) = stranger() else {
        return;
    };
    let output = Output::create(&theirs.path().join("stats"), &account).unwrap();
    chown(theirs.path(), Some(0), Some(0)).unwrap();
    let saved = output.write_json(&1).unwrap_err().saved.unwrap();
    assert!(names(theirs.path()).is_empty());
    fs::remove_file(saved).unwrap();
}
