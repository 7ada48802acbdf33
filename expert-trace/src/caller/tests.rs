use super::*;
use nix::unistd::{ROOT, getegid, getgroups};
use std::{
    env,
    ffi::OsStr,
    os::unix::fs::{MetadataExt as _, chown},
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
};

/// An id that no user database knows.
const STRANGER: u32 = 54321;

fn stranger() -> Account {
    Account::by_ids(Uid::from_raw(STRANGER), Gid::from_raw(STRANGER + 1)).unwrap()
}

fn environment(text: &str) -> Environment {
    Environment::parse(text.replace(' ', "\0").as_bytes())
}

fn text(environment: &Environment) -> String {
    let entries: Vec<_> = environment
        .entries()
        .map(|entry| String::from_utf8(entry).unwrap())
        .collect();
    entries.join(" ")
}

fn needs_root() -> bool {
    let root = geteuid().is_root();
    if !root {
        eprintln!("not tested: needs root");
    }
    root
}

#[test]
fn accounts() {
    let root = Account::by_name("root").unwrap();
    assert_eq!((root.uid, root.gid), (ROOT, Gid::from_raw(0)));
    assert_eq!(root.name.as_deref(), Some("root"));
    assert!(root.groups.contains(&root.gid));
    assert_eq!(root.home, Path::new("/root"));
    assert_eq!(Account::by_ids(root.uid, root.gid).unwrap(), root);

    let stranger = stranger();
    assert_eq!(stranger.name, None);
    assert_eq!(stranger.home, Path::new("/"));
    assert_eq!(stranger.groups, [stranger.gid]);

    let current = Account::current().unwrap();
    assert_eq!((current.uid, current.gid), (geteuid(), getegid()));

    let error = Account::by_name("no-such-user").unwrap_err();
    assert!(error.to_string().contains("no-such-user"), "{error}");
}

#[test]
fn rights_are_lent_and_given_back() {
    if !needs_root() {
        return;
    }
    let account = stranger();
    let before = (geteuid(), getegid(), getgroups().unwrap());
    let directory = tempfile::tempdir().unwrap();
    chown(directory.path(), Some(STRANGER), None).unwrap();
    let secret = tempfile::NamedTempFile::new().unwrap();

    let during = account
        .with_rights(|| {
            let refused = fs::read(secret.path()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            fs::write(directory.path().join("file"), "")?;
            Ok((geteuid(), getegid(), getgroups()?))
        })
        .unwrap();
    assert_eq!(during, (account.uid, account.gid, account.groups.clone()));
    let file = fs::metadata(directory.path().join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (STRANGER, STRANGER + 1));
    let now = || (geteuid(), getegid(), getgroups().unwrap());
    assert_eq!(now(), before);
    fs::read(secret.path()).unwrap();

    let panics = AssertUnwindSafe(|| account.with_rights(|| -> io::Result<()> { panic!("meant") }));
    catch_unwind(panics).unwrap_err();
    assert_eq!(now(), before);
    account
        .with_rights(|| -> io::Result<()> { Err(io::ErrorKind::Other.into()) })
        .unwrap_err();
    assert_eq!(now(), before);
}

#[test]
fn rights_of_other_threads_stay() {
    if !needs_root() {
        return;
    }
    let (ask, asked) = std::sync::mpsc::channel();
    let (answer, answered) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        asked.recv().unwrap();
        answer.send(geteuid()).unwrap();
    });
    let other = stranger().with_rights(|| {
        ask.send(()).unwrap();
        Ok(answered.recv().unwrap())
    });
    assert_eq!(other.unwrap(), ROOT);
}

#[test]
fn the_id_that_means_unchanged_is_refused() {
    if !needs_root() {
        return;
    }
    for (uid, gid) in [(u32::MAX, 1), (1, u32::MAX)] {
        let account = Account {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            ..stranger()
        };
        let result = account.with_rights(|| Ok(()));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn environments() {
    let mut environment = Environment::parse(b"A=1\0=x\0odd\0\0B=a=b\0A=2\0C=\0D=\xff");
    assert_eq!(environment.get("A"), Some(OsStr::new("1")));
    assert_eq!(environment.get("B"), Some(OsStr::new("a=b")));
    assert_eq!(environment.get("C"), Some(OsStr::new("")));
    assert_eq!(environment.get("D"), Some(OsStr::from_bytes(b"\xff")));
    assert_eq!(environment.get("odd"), None);
    environment.remove("D");
    environment.set("A", "3");
    environment.set("E", "4");
    assert_eq!(text(&environment), "A=3 B=a=b C= E=4");
    assert_eq!(Environment::parse(b""), Environment::default());
}

#[test]
fn what_was_set_on_purpose_goes_on_top() {
    let table = [
        // invoker's, ours, the program's
        ("HOME=/h A=1", "", "HOME=/h A=1"),
        ("HOME=/h A=1", "A=2 B=3", "HOME=/h A=2 B=3"),
        (
            "HOME=/h PATH=/p USER=u TERM=t SUDO_UID=7",
            "HOME=/root PATH=/s USER=root TERM=unknown MAIL=m LOGNAME=root SUDO_UID=1 SUDO_X=2",
            "HOME=/h PATH=/p USER=u TERM=t SUDO_UID=7",
        ),
        ("A=1", "HOME=/root", "A=1 HOME=/"),
        (
            "HOME=/h PWD=/a SHLVL=2 _=sudo",
            "PWD=/b SHLVL=1 _=expert-trace",
            "HOME=/h PWD=/b SHLVL=2 _=sudo",
        ),
        (
            "HOME=/h LD_LIBRARY_PATH=/l XDG_RUNTIME_DIR=/run/user/1",
            "XDG_RUNTIME_DIR=/run/user/0",
            "HOME=/h LD_LIBRARY_PATH=/l XDG_RUNTIME_DIR=/run/user/1",
        ),
    ];
    for (invoker, own, expected) in table {
        let merged = merge(environment(invoker), &environment(own), &stranger());
        assert_eq!(text(&merged), expected);
    }
}

#[test]
fn another_users_environment_is_adapted() {
    let own = "USER=root A=1 HOME=/root MAIL=m SUDO_UID=1 XDG_RUNTIME_DIR=/run/user/0 PATH=/p";
    let mut nameless = environment(own);
    nameless.adapt(&stranger());
    assert_eq!(text(&nameless), "A=1 HOME=/ PATH=/p SHELL=/bin/sh");
    let mut named = environment(own);
    named.adapt(&Account {
        name: Some("alice".to_owned()),
        home: "/home/alice".into(),
        shell: "/bin/zsh".into(),
        ..stranger()
    });
    assert_eq!(
        text(&named),
        "A=1 HOME=/home/alice PATH=/p SHELL=/bin/zsh USER=alice LOGNAME=alice"
    );
}

#[test]
fn ids() {
    let read = |text| id(&environment(text), "SUDO_UID").map_err(|error| error.to_string());
    assert_eq!(read("SUDO_UID=0"), Ok(0));
    assert_eq!(read("SUDO_UID=1000"), Ok(1000));
    for text in [
        "",
        "SUDO_UID=",
        "SUDO_UID=-1",
        "SUDO_UID=4294967295",
        "SUDO_UID=me",
    ] {
        assert!(read(text).unwrap_err().contains("SUDO_UID"), "{text}");
    }
}

#[test]
fn lines_of_proc() {
    assert_eq!(parse_parent(b"7 (sudo) S 3 7 7 0"), Some(3));
    assert_eq!(parse_parent(b"7 (a) R 9 (b)) S 3 7 7 0"), Some(3));
    assert_eq!(parse_parent(b"7 (sudo"), None);
    assert_eq!(parse_parent(b""), None);
    let status = b"Name:\tUid:\nUmask:\t0022\nUid:\t1000\t0\t0\t0\nGid:\t1\t2\t3\t4\n";
    assert_eq!(parse_effective_uid(status), Some(0));
    assert_eq!(parse_effective_uid(b"Uid:\t1000\n"), None);
    for (exe, expected) in [
        ("/usr/bin/sudo", true),
        ("/usr/bin/sudo (deleted)", true),
        ("/usr/bin/sudo-rs", true),
        ("/usr/bin/sudoedit-like", false),
        ("/sudo/bash", false),
        ("/", false),
    ] {
        assert_eq!(names_sudo(Path::new(exe)), expected, "{exe}");
    }
}

#[test]
fn the_programs_account() {
    let caller = Caller {
        account: stranger(),
        environment: environment("A=1"),
        notice: None,
    };
    let variables = [("A".into(), "2".into()), ("B".into(), "3".into())];
    let (account, its) = caller.program(None, &variables).unwrap();
    assert_eq!((account, text(&its)), (stranger(), "A=2 B=3".to_owned()));

    let error = caller.program(Some("no-such-user"), &[]).unwrap_err();
    assert!(error.to_string().contains("no-such-user"), "{error}");

    let result = caller.program(Some("root"), &variables);
    if geteuid().is_root() {
        let (account, its) = result.unwrap();
        assert_eq!(account.uid, ROOT);
        assert_eq!(its.get("HOME"), Some(OsStr::new("/root")));
        assert_eq!(its.get("PATH"), env::var_os("PATH").as_deref());
        assert_eq!(its.get("A"), Some(OsStr::new("2")));
    } else {
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("only root") && error.contains("--user"),
            "{error}"
        );
    }
}

/// Runs itself as a child of a shell that is called `sudo`.
#[test]
fn the_environment_of_sudo_is_found() {
    const CHILD: &str = "EXPERT_TRACE_TEST_CHILD";
    if env::var_os(CHILD).is_some() {
        let caller = Caller::detect().unwrap();
        println!("caller: {} {:?}", text(&caller.environment), caller.account);
        println!("notice: {:?}", caller.notice);
        return;
    }
    if !needs_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let call = |shell: &str| {
        let program = directory.path().join(shell);
        fs::copy("/bin/sh", &program).unwrap();
        let output = Command::new(program)
            .env_clear()
            .envs([("HOME", "/h"), ("A", "1"), ("USER", "alice")])
            .arg("-c")
            .arg(format!(
                "/usr/bin/env -i {CHILD}=1 SUDO_UID={STRANGER} SUDO_GID=1 HOME=/root B=2 \"$0\" \
                 --exact caller::tests::the_environment_of_sudo_is_found --nocapture; exit $?"
            ))
            .arg(env::current_exe().unwrap())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let found = call("sudo");
    assert!(found.contains("A=1 "), "{found}");
    assert!(
        found.contains("HOME=/h ") && found.contains("USER=alice "),
        "{found}"
    );
    assert!(found.contains(" B=2 "), "{found}");
    assert!(found.contains(&format!("uid: Uid({STRANGER})")), "{found}");
    assert!(found.contains("notice: None"), "{found}");

    if invokers_environment().is_ok() {
        return eprintln!("the rest is not tested: we run under sudo");
    }
    let not_found = call("no-sudo");
    assert!(!not_found.contains("A=1 "), "{not_found}");
    assert!(
        not_found.contains("HOME=/ ") && not_found.contains("B=2 "),
        "{not_found}"
    );
    assert!(not_found.contains("notice: Some"), "{not_found}");
}
