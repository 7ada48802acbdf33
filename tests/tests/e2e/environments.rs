//! Where a target and its files can be: other mounts, other roots, layers of an overlay, other process
//! numbers, files that are gone, and names that are hard to read.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{self, Attached, Stats},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{
    errors::{with_capabilities, without_uprobe_multi},
    layouts::compile_to,
    support::{Files, Waiting, driver, known_small, llama, scratch},
};

/// What the stand-in is told to compute: 3 layers, 3 rows of 4 experts of 128.
const COMPUTE: [&str; 6] = ["new", "4", "3", "4", "128", "none"];

/// What it computes then, so many times, by its own description.
fn rows(times: usize) -> Vec<(u32, Vec<u32>)> {
    let row = |layer: u32, row: u32| (0..4).map(|j| (31 * layer + 7 * row + j) % 32).collect();
    let once = || (0..3).flat_map(|layer| (0..3).map(move |number| (layer, row(layer, number))));
    (0..times).flat_map(|_| once()).collect()
}

/// A directory with the stand-in as a program (`standin`) and as a library (`lib.so`), a program that
/// opens that (`loader`), and one that waits before it does (`waiter`).
fn files() -> TempDir {
    let directory = scratch();
    let at = |name: &str| directory.path().join(name);
    compile_to(&at("standin"), &["standin.c"], &[]);
    compile_to(&at("lib.so"), &["standin.c"], &["-shared", "-fPIC"]);
    compile_to(&at("loader"), &["loader.c"], &["-ldl"]);
    compile_to(&at("waiter"), &["loader.c"], &["-ldl", "-DWAIT"]);
    directory
}

/// Runs a command under the tracer, in which the stand-in computes so many times.
#[track_caller]
fn run(command: &Command, times: usize) -> Stats {
    let files = Files::new();
    let output = tracer::run(&files.options(), command)
        .unwrap()
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let (stats, seen) = (files.stats(), files.log());
    stats.assert_complete();
    assert_eq!(seen, rows(times), "{}", said(&output));
    stats
}

/// Starts a command that becomes a `waiter`, changes something, and attaches to it, or to the process that
/// it has started, while that computes twice.
#[track_caller]
fn attach(command: Command, change: impl FnOnce()) -> Stats {
    let mut target = Waiting::start(command);
    target.until_it_waits();
    change();
    let files = Files::new();
    let attached = Attached::to(innermost(target.pid()), &files.options()).unwrap();
    compute_twice(&mut target);
    let said = attached.interrupt().unwrap();
    assert!(target.end().1.success());
    let (stats, seen) = (files.stats(), files.log());
    stats.assert_complete();
    assert_eq!(seen, rows(2), "{said}");
    stats
}

/// Without a scheduler, a first pass counts when there is a second.
fn compute_twice(target: &mut Waiting) {
    for _ in 0..2 {
        target.go_on();
        target.until_it_waits();
    }
}

/// A process, or its only child.
fn innermost(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap_or(pid)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn command(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// `sh` with mounts of its own; `$0` is a directory.
fn with_mounts(script: &str, directory: &Path) -> Command {
    let mut command = command("unshare", &["--mount", "sh", "-e", "-c", script]);
    command.arg(directory);
    command
}

fn hook_files(stats: &Stats) -> Vec<PathBuf> {
    let hooks = stats.0["target"]["hooks"].as_array().unwrap().iter();
    let of_library = hooks.filter(|hook| hook["hook"] == "expert_ids");
    of_library
        .map(|hook| hook["file"].as_str().unwrap().into())
        .collect()
}

/// Copies what the dynamic linker needs for a program to the same place in another root directory.
fn copy_libraries(program: &Path, root: &Path) {
    let ldd = Command::new("ldd").arg(program).output().unwrap();
    for word in String::from_utf8(ldd.stdout).unwrap().split_whitespace() {
        if let Some(path) = word.strip_prefix('/') {
            let copy = root.join(path);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(word, copy).unwrap();
        }
    }
}

/// The files exist for the target alone.
#[test]
fn another_mount_namespace() {
    let directory = files();
    let hidden = "cp -r $0 /dev/shm/copy.$$ && mount -t tmpfs none $0 && mv /dev/shm/copy.$$/* $0 && \
                  rmdir /dev/shm/copy.$$ && mkdir $0/inner && mv $0/lib.so $0/inner && ";
    let target = |program: &str| {
        let compute = COMPUTE.join(" ");
        let script = format!("{hidden} exec $0/{program} $0/inner/lib.so {compute}");
        with_mounts(&script, directory.path())
    };
    let inner = [directory.path().join("inner/lib.so")];
    assert_eq!(hook_files(&run(&target("loader"), 1)), inner);
    assert_eq!(hook_files(&attach(target("waiter"), || ())), inner);
    assert!(!inner[0].exists());
}

#[test]
fn another_root_directory() {
    let directory = files();
    copy_libraries(&directory.path().join("loader"), directory.path());
    // In there it is an absolute path, which leads elsewhere out here.
    symlink("/lib.so", directory.path().join("link.so")).unwrap();
    let target = |program: &str| {
        let mut target = command(
            "chroot",
            &[directory.path().to_str().unwrap(), program, "/link.so"],
        );
        target.args(COMPUTE);
        target
    };
    run(&target("/loader"), 1);
    attach(target("/waiter"), || ());
}

/// A script for `with_mounts` that shows a container's layers as `merged`: `lower` as it is, and what is
/// changed above it. All but a given `lower` is in memory, to which the files in `$0` are moved: where
/// that is itself on an overlay, the kernel refuses it as a layer to change.
fn on_overlay(lower: &str, script: &str) -> String {
    format!(
        "cd $0 && mkdir memory merged && mount -t tmpfs none memory && cd memory && \
         mkdir lower upper work && find .. -maxdepth 1 -type f -exec mv {{}} lower ';' && \
         mount -t overlay -o lowerdir={lower},upperdir=upper,workdir=work none ../merged && \
         cd .. && {script}"
    )
}

/// One file has two devices. When it is changed, its number stays, and it is another file.
#[test]
fn layers_of_an_overlay_in_one_run() {
    let compute = COMPUTE.join(" ");
    let script = on_overlay(
        "lower",
        &format!(
            "memory/lower/standin {compute}; merged/standin {compute}; chmod 700 merged/standin; \
         merged/standin {compute}; memory/lower/standin {compute}; touch merged/lib.so; \
         merged/loader $0/merged/lib.so {compute}; merged/loader $0/memory/lower/lib.so {compute}"
        ),
    );
    let directory = files();
    let stats = run(&with_mounts(&script, directory.path()), 6);
    let contexts = stats.0["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 6);
    for context in contexts {
        assert_eq!(context["passes"], 1);
    }
    // The program as it is below and above, and the library likewise.
    assert_eq!(hook_files(&stats).len(), 4);
}

#[test]
fn attach_to_a_program_on_an_overlay() {
    let compute = COMPUTE.join(" ");
    let directory = files();
    let script = on_overlay(
        "lower",
        &format!("exec merged/waiter merged/lib.so {compute}"),
    );
    attach(with_mounts(&script, directory.path()), || ());
}

/// The kernel finds the file by a name that leads to another one by now.
#[test]
fn a_library_that_was_copied_up_is_no_silence() {
    let compute = COMPUTE.join(" ");
    let directory = files();
    let script = on_overlay(
        "lower",
        &format!("exec merged/waiter merged/lib.so {compute}"),
    );
    let mut target = Waiting::start(with_mounts(&script, directory.path()));
    target.until_it_waits();
    let library = format!(
        "/proc/{}/root{}/merged/lib.so",
        target.pid(),
        directory.path().display()
    );
    fs::set_permissions(library, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let refused = Attached::to::<&str>(target.pid(), &[])
        .err()
        .unwrap()
        .to_string();
    assert!(
        refused.contains("merged/lib.so as it was before somebody changed it"),
        "{refused}"
    );
    assert!(target.end().1.success());
}

/// Containers of one image: the file has another device in each, and another one below them.
#[test]
fn all_containers_of_an_image() {
    let directory = files();
    let image = directory.path();
    let compute = COMPUTE.join(" ");
    let containers = [0, 1].map(|_| {
        let script = on_overlay(
            image.to_str().unwrap(),
            &format!("exec merged/waiter merged/lib.so {compute}"),
        );
        let of_container = scratch();
        let mut target = Waiting::start(with_mounts(&script, of_container.path()));
        target.until_it_waits();
        (target, of_container)
    });
    let places = scratch();
    let output = places.path().join("%p");
    let mut tracer = tracer::command().unwrap();
    tracer
        .args(["attach", "--all", "--library"])
        .arg(image.join("lib.so"));
    tracer.arg("-o").arg(&output).arg("--top=0");
    let attached = Attached::by(&mut tracer).unwrap();
    let pids = containers.map(|(mut target, _of_container)| {
        compute_twice(&mut target);
        let pid = target.pid();
        assert!(target.end().1.success());
        pid
    });
    let (status, said) = attached.wait().unwrap();
    assert!(status.success(), "{said}");
    for pid in pids {
        let stats = Stats::read(&places.path().join(pid.to_string())).unwrap();
        stats.assert_complete();
        assert_eq!(stats.number("/target/pid"), u64::from(pid));
        assert_eq!(stats.tokens(), (0..3).map(|layer| (layer, 6)).collect());
    }
}

/// Has a tracer attach to a `waiter`, which computes twice.
#[track_caller]
fn attach_by(mut tracer: Command, target: Command) -> Stats {
    let files = Files::new();
    let mut target = Waiting::start(target);
    target.until_it_waits();
    tracer.args(["attach", "--pid", &target.pid().to_string()]);
    let attached = Attached::by(tracer.args(files.options())).unwrap();
    compute_twice(&mut target);
    let said = attached.interrupt().unwrap();
    assert!(target.end().1.success());
    let (stats, seen) = (files.stats(), files.log());
    stats.assert_complete();
    assert_eq!(seen, rows(2), "{said}");
    stats
}

/// Probes are perf events then.
#[test]
fn a_kernel_without_uprobe_multi() {
    let directory = files();
    let at = |name: &str| directory.path().join(name);
    let by_perf_events =
        |stats: &Stats| assert_eq!(stats.0["capture"]["attached_by"], "perf_event");

    let files = Files::new();
    let mut tracer = without_uprobe_multi();
    tracer.arg("run").args(files.options()).arg("--");
    let output = tracer.arg(at("standin")).args(COMPUTE).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let (stats, seen) = (files.stats(), files.log());
    stats.assert_complete();
    assert_eq!(seen, rows(1), "{}", said(&output));
    by_perf_events(&stats);

    let mut target = Command::new(at("waiter"));
    target.arg(at("lib.so")).args(COMPUTE);
    by_perf_events(&attach_by(without_uprobe_multi(), target));

    // It hits a return probe, too.
    let doctor = without_uprobe_multi().arg("doctor").output().unwrap();
    let said = String::from_utf8(doctor.stdout).unwrap();
    assert!(said.contains("every hit arrived"), "{said}");
}

/// Perf events would take CAP_SYS_ADMIN.
#[test]
fn attach_with_two_capabilities() {
    let directory = files();
    let at = |name: &str| directory.path().join(name);
    // Nobody may look at a process that can do more.
    let mut target = command("setpriv", &["--bounding-set=-all", "--inh-caps=-all"]);
    target.arg(at("waiter")).arg(at("lib.so")).args(COMPUTE);
    let stats = attach_by(with_capabilities(",+bpf,+perfmon"), target);
    assert_eq!(stats.0["capture"]["attached_by"], "uprobe_multi");
}

/// Process numbers of its own, for the target or for the tracer.
#[test]
fn other_process_numbers() {
    let directory = files();
    let at = |name: &str| directory.path().join(name);
    let unshare = |program: &Path| {
        let mut target = command(
            "unshare",
            &["--pid", "--fork", "--mount-proc", "--kill-child"],
        );
        target.arg(program);
        target
    };
    let target = |program: &str| {
        let mut target = unshare(&at(program));
        target.arg(at("lib.so")).args(COMPUTE);
        target
    };
    run(&target("loader"), 1);
    attach(target("waiter"), || ());

    let files = Files::new();
    let mut tracer = unshare(&tracer::program().unwrap());
    tracer.arg("run").args(files.options()).arg("--");
    tracer.arg(at("loader")).arg(at("lib.so")).args(COMPUTE);
    tracer::without_sudo(&mut tracer);
    let output = tracer.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let (stats, seen) = (files.stats(), files.log());
    stats.assert_complete();
    assert_eq!(seen, rows(1));
    assert_eq!(stats.number("/contexts/0/pid"), stats.number("/target/pid"));

    let mut waiter = Waiting::start(target("waiter"));
    waiter.until_it_waits();
    let inside = innermost(waiter.pid()).to_string();
    let enter = |namespaces: &[&str], pid: &str| {
        let mut tracer = command("nsenter", &["--target", &inside, "--pid"]);
        tracer.args(namespaces).arg(tracer::program().unwrap());
        tracer.args(["attach", "--pid", pid]);
        tracer::without_sudo(&mut tracer);
        tracer
    };
    // Numbers of one namespace, and /proc of another.
    let output = enter(&[], "1").output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        said(&output).contains("/proc is that of another PID namespace"),
        "{}",
        said(&output)
    );

    let files = Files::new();
    let mut tracer = enter(&["--mount"], "1");
    let attached = Attached::by(tracer.args(files.options())).unwrap();
    compute_twice(&mut waiter);
    // `nsenter` waits for the tracer.
    let tracer = Pid::from_raw(innermost(attached.pid()) as i32);
    kill(tracer, Signal::SIGINT).unwrap();
    let (status, said) = attached.wait().unwrap();
    assert!(status.success(), "{said}");
    assert!(waiter.end().1.success());
    let (stats, seen) = (files.stats(), files.log());
    stats.assert_complete();
    assert_eq!(seen, rows(2), "{said}");
    assert_eq!(stats.number("/target/pid"), 1);
}

/// What is mapped is not what the path leads to any more.
#[test]
fn files_that_are_gone() {
    let directory = files();
    let at = |name: &str| directory.path().join(name);
    let target = |library: &Path| {
        let mut target = Command::new(at("program"));
        target.arg(library).args(COMPUTE);
        target
    };
    for change in ["deleted", "replaced"] {
        let library = at(change);
        fs::copy(at("lib.so"), &library).unwrap();
        fs::copy(at("waiter"), at("program")).unwrap();
        attach(target(&library), || {
            for file in [library.clone(), at("program")] {
                if change == "deleted" {
                    fs::remove_file(file).unwrap();
                } else {
                    // Another program, with the same functions elsewhere.
                    compile_to(&at("new"), &["standin.c"], &["-O0"]);
                    fs::rename(at("new"), file).unwrap();
                }
            }
        });
    }
}

#[test]
fn names_that_are_hard_to_read() {
    let directory = files();
    let at = |name: &str| directory.path().join(name);
    let names = ["of two words", "line\nfeed", "not (deleted)"];
    // All before any is run: a file that is open for writing, be it in a forked child, cannot be.
    for name in names {
        for file in ["loader", "waiter", "lib.so"] {
            let copy = at(&format!("{name} {file} {name}"));
            fs::copy(at(file), &copy).unwrap();
            symlink(&copy, at(&format!("link to {file} {name}"))).unwrap();
        }
    }
    let trace = &|name: &str| {
        let target = |program: &str, place: &str| {
            let mut target = Command::new(at(&format!("{place}{program} {name}")));
            target
                .arg(at(&format!("{place}lib.so {name}")))
                .args(COMPUTE);
            target
        };
        let library = [at(&format!("{name} lib.so {name}"))];
        assert_eq!(hook_files(&run(&target("loader", "link to "), 1)), library);
        let stats = attach(target("waiter", &format!("{name} ")), || ());
        assert_eq!(hook_files(&stats), library);
    };
    // Each spends most of its time on waiting for the kernel.
    thread::scope(|scope| {
        for name in names {
            scope.spawn(move || trace(name));
        }
    });
}

/// Two builds of ggml in one process, from before and after its tensors changed.
#[test]
fn two_libraries_in_one_process() {
    let directory = files();
    let at = |name: &str| directory.path().join(name);
    compile_to(&at("pair"), &["pair.c"], &["-ldl", "-pthread"]);
    fs::copy(at("lib.so"), at("old.so")).unwrap();
    let target = || {
        let mut target = command(at("pair"), &["3"]);
        target
            .arg(at("lib.so"))
            .args(["new", "4", "30", "4", "128", "none"]);
        target
            .arg(at("old.so"))
            .args(["old", "8", "50", "4", "256", "none"]);
        target
    };
    let check = |files: &Files| {
        let stats = files.stats();
        stats.assert_complete();
        let mut layouts: Vec<&str> = stats.0["target"]["tensor_layouts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layout| layout["builds"].as_str().unwrap())
            .collect();
        layouts.sort_unstable();
        assert_eq!(layouts, ["b3209 to b4105", "b4106 or newer"]);
        let mut contexts: Vec<[u64; 4]> = (0..2)
            .map(|id| {
                let of = |key: &str| stats.number(&format!("/contexts/{id}/{key}"));
                assert_eq!(
                    stats.0["contexts"][id]["layers"].as_array().unwrap().len(),
                    3
                );
                [
                    "passes",
                    "layers/2/total_tokens",
                    "layers/0/n_expert",
                    "layers/1/k",
                ]
                .map(of)
            })
            .collect();
        contexts.sort_unstable();
        assert_eq!(contexts, [[3, 90, 32, 4], [3, 150, 64, 8]]);
    };
    let files = Files::new();
    let mut traced = Waiting::start(tracer::run(&files.options(), &target()).unwrap());
    traced.until_it_waits();
    traced.go_on();
    assert!(traced.end().1.success());
    check(&files);

    let files = Files::new();
    let mut alone = Waiting::start(target());
    alone.until_it_waits();
    let attached = Attached::to(alone.pid(), &files.options()).unwrap();
    alone.go_on();
    alone.until_it_waits();
    attached.interrupt().unwrap();
    assert!(alone.end().1.success());
    check(&files);
}

/// Fails unless `PROMPT` was seen whole, in a context of the known model.
#[track_caller]
fn assert_prompt(stats: &Stats, seen: &[(u32, Vec<u32>)]) {
    stats.assert_complete();
    let known = known_small();
    let last = known.expected.layers() - 1;
    for layer in 0..=last {
        // The last layer computes for the token whose output is wanted.
        let tokens = if layer == last { 139..140 } else { 100..140 };
        let expected: Vec<&[u32]> = tokens
            .map(|token| known.expected.ids(layer, token))
            .collect();
        let of_layer = seen.iter().filter(|(of, _)| *of == layer);
        let ids: Vec<&[u32]> = of_layer.map(|(_, ids)| ids.as_slice()).collect();
        assert_eq!(ids, expected, "layer {layer}");
    }
    assert_eq!(stats.0["contexts"][0]["model"], 0);
}

/// Decodes tokens 100 to 139.
const PROMPT: &str = "prompt 0 40 100";

/// llama.cpp's own libraries, as a container has them: on an overlay that nobody else sees.
#[test]
fn llama_cpp_on_an_overlay_in_another_mount_namespace() {
    let known = known_small();
    let target = |directory: &Path| {
        let script = on_overlay(
            llama().bin.to_str().unwrap(),
            "export LD_LIBRARY_PATH=$0/merged && exec \"$@\"",
        );
        let mut command = with_mounts(&script, directory);
        let driver = driver(&known.path, &["-t", "2"]);
        command.arg(driver.get_program()).args(driver.get_args());
        command
    };
    let check = |files: &Files, directory: &Path| {
        let stats = files.stats();
        assert_prompt(&stats, &files.log());
        let [file] = &hook_files(&stats)[..] else {
            panic!("{:#}", stats.0["target"])
        };
        assert!(
            file.starts_with(directory.join("merged")),
            "{}",
            file.display()
        );
    };

    let (files, directory) = (Files::new(), scratch());
    let mut command = tracer::run(&files.options(), &target(directory.path())).unwrap();
    let mut traced = Oracle::spawn(&mut command).unwrap();
    traced.command(PROMPT).unwrap();
    assert!(traced.quit().unwrap().success());
    check(&files, directory.path());

    let (files, directory) = (Files::new(), scratch());
    let mut alone = Oracle::spawn(&mut target(directory.path())).unwrap();
    let attached = Attached::to(alone.pid(), &files.options()).unwrap();
    alone.command(PROMPT).unwrap();
    attached.interrupt().unwrap();
    assert!(alone.quit().unwrap().success());
    check(&files, directory.path());
}

/// llama.cpp in another root directory, under a name of several words and by a link that leads elsewhere
/// out here. When it is ready its files are removed, and one gives way to another library with the same
/// function elsewhere, as when a package is updated below a server.
#[test]
fn llama_cpp_in_another_root_directory_whose_files_are_replaced() {
    let known = known_small();
    let prepare = || {
        let root = scratch();
        copy_libraries(&llama().oracle, root.path());
        let place = root.path().join("of two words");
        fs::create_dir(&place).unwrap();
        for file in fs::read_dir(&llama().bin).unwrap().map(Result::unwrap) {
            let name = file.file_name().into_string().unwrap();
            if name.contains(".so.") {
                fs::copy(file.path(), place.join(name)).unwrap();
            }
        }
        fs::copy(&llama().oracle, place.join("driver")).unwrap();
        fs::copy(&known.path, place.join("known.gguf")).unwrap();
        symlink("/of two words", root.path().join("link")).unwrap();
        // Where it was linked with them.
        fs::remove_dir_all(root.path().join(llama().bin.strip_prefix("/").unwrap())).unwrap();
        root
    };
    let target = |root: &Path| {
        let root = root.to_str().unwrap();
        let mut target = command("env", &["LD_LIBRARY_PATH=/link", "chroot", root]);
        target.args(["/link/driver", "-m", "/link/known.gguf", "-t", "2"]);
        target
    };
    let replace = |root: &Path| {
        let place = root.join("of two words");
        for file in fs::read_dir(&place).unwrap().map(Result::unwrap) {
            fs::remove_file(file.path()).unwrap();
        }
        compile_to(
            &place.join("libggml-cpu.so.0"),
            &["standin.c"],
            &["-shared", "-fPIC"],
        );
    };
    let check = |files: &Files, root: &Path| {
        let stats = files.stats();
        assert_prompt(&stats, &files.log());
        let place = root.join("of two words");
        assert_eq!(hook_files(&stats), [place.join("libggml-cpu.so.0")]);
        let model = place.join("known.gguf");
        assert_eq!(stats.0["models"][0]["path"], model.to_str().unwrap());
    };

    let (files, root) = (Files::new(), prepare());
    let mut command = tracer::run(&files.options(), &target(root.path())).unwrap();
    let mut traced = Oracle::spawn(&mut command).unwrap();
    replace(root.path());
    traced.command(PROMPT).unwrap();
    assert!(traced.quit().unwrap().success());
    check(&files, root.path());

    let (files, root) = (Files::new(), prepare());
    let mut alone = Oracle::spawn(&mut target(root.path())).unwrap();
    replace(root.path());
    let attached = Attached::to(alone.pid(), &files.options()).unwrap();
    alone.command(PROMPT).unwrap();
    attached.interrupt().unwrap();
    assert!(alone.quit().unwrap().success());
    check(&files, root.path());
}
