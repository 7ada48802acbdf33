//! Builds of the pinned llama.cpp that differ in what they leave for a tracer to find: compilers,
//! options, linkage, symbols.
//!
//! libllama is built twice, shared and static. What differs from row to row is ggml, which is built
//! anew and put beside a copy of the shared libllama, or linked with the static one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use expert_trace_tests::builds::{Build, Driven, Fate, Model, strip_libraries};

use crate::llama::{self, Compiler, How, RELEASE};
use crate::planned::Planned;
use crate::{cache, command, driver, packages, prebuilt};

/// All of a shared ggml.
const GGML: &[&str] = &["ggml", "ggml-base", "ggml-cpu"];

/// How long that takes.
const DURATION: &str = "about 2 minutes on 2 cores";
const DURATION_VULKAN: &str = "longer than all else here, for its shaders";

/// With ggml's own threads: Debian's Clang comes without OpenMP, and other systems' with it.
const CLANG: How = How {
    name: "ggml-clang",
    compiler: Compiler::Clang,
    options: &["-DGGML_OPENMP=OFF"],
    targets: GGML,
    duration: DURATION,
};

const LTO: How = How {
    name: "ggml-lto",
    compiler: Compiler::System,
    options: &["-DGGML_LTO=ON"],
    targets: GGML,
    duration: DURATION,
};

const DEBUG_INFO: How = How {
    name: "ggml-debug-info",
    compiler: Compiler::System,
    options: &["-DCMAKE_BUILD_TYPE=RelWithDebInfo"],
    targets: GGML,
    duration: DURATION,
};

const NATIVE: How = How {
    name: "ggml-native",
    compiler: Compiler::System,
    options: &["-DGGML_NATIVE=ON"],
    targets: GGML,
    duration: DURATION,
};

/// A library for each kind of processor, one of which is opened at run time.
const ALL_VARIANTS: How = How {
    name: "ggml-all-variants",
    compiler: Compiler::System,
    options: &["-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"],
    // The variants are dependencies of ggml.
    targets: &["ggml", "ggml-base"],
    duration: "about 7 minutes on 2 cores",
};

const STATIC: How = How {
    name: "llama.cpp-static",
    compiler: Compiler::System,
    options: &["-DBUILD_SHARED_LIBS=OFF"],
    targets: &["llama"],
    duration: "about 5 minutes on 2 cores",
};

const STATIC_LTO: How = How {
    name: "ggml-static-lto",
    compiler: Compiler::System,
    options: &["-DBUILD_SHARED_LIBS=OFF", "-DGGML_LTO=ON"],
    targets: GGML,
    duration: DURATION,
};

/// With a device that takes weights in the middle of a graph, and gives ids back.
const VULKAN: How = How {
    name: "ggml-vulkan",
    compiler: Compiler::System,
    options: &["-DGGML_VULKAN=ON"],
    targets: GGML,
    duration: DURATION_VULKAN,
};

const VULKAN_CLANG: How = How {
    name: "ggml-vulkan-clang",
    compiler: Compiler::Clang,
    options: &["-DGGML_OPENMP=OFF", "-DGGML_VULKAN=ON"],
    targets: GGML,
    duration: DURATION_VULKAN,
};

const VULKAN_STATIC: How = How {
    name: "ggml-vulkan-static",
    compiler: Compiler::System,
    options: &["-DBUILD_SHARED_LIBS=OFF", "-DGGML_VULKAN=ON"],
    targets: GGML,
    duration: DURATION_VULKAN,
};

/// Shared builds that differ in ggml, and what to trace them with.
const SHARED: [(&str, &How, &[Model]); 5] = [
    ("shared, Clang, without OpenMP", &CLANG, &[Model::Qwen3Moe]),
    ("shared, GCC, `GGML_LTO`", &LTO, &[Model::Qwen3Moe]),
    (
        "shared, GCC, RelWithDebInfo",
        &DEBUG_INFO,
        &[Model::Qwen3Moe],
    ),
    (
        "shared, GCC, `GGML_BACKEND_DL`, `GGML_CPU_ALL_VARIANTS`",
        &ALL_VARIANTS,
        &[Model::Qwen3Moe],
    ),
    (
        "shared, GCC, `GGML_NATIVE`",
        &NATIVE,
        &[Model::Q4_0, Model::Q4K, Model::Q8_0, Model::F16, Model::F32],
    ),
];

/// All of them.
pub fn all(root: &Path) -> Vec<Planned<'_>> {
    const MODEL: &[Model] = &[Model::Qwen3Moe];
    let mut builds = vec![
        shared(root, "shared, GCC, Release", MODEL, llama::shared),
        shared(root, "shared, GCC, stripped", MODEL, || {
            stripped(&llama::shared()?)
        }),
    ];
    for (name, how, models) in SHARED {
        builds.push(shared(root, name, models, || {
            with_libllama(&llama::build(&llama::sources()?, how)?, &llama::shared()?)
        }));
    }
    let archives = || llama::build(&llama::sources()?, &STATIC);
    let lto = || llama::build(&llama::sources()?, &STATIC_LTO);
    let linked = |ggml: &Path, llama: &Path| linked_driver(&driver::source(root), ggml, llama);
    builds.extend([
        Planned::new("static, GCC", move |name| {
            let archives = archives()?;
            Ok(of_the_driver(
                name,
                vec![linked(&archives, &archives)?],
                MODEL,
            ))
        }),
        Planned::new("static, GCC, stripped", move |name| {
            const SAYS: &str = "contains llama.cpp without symbols (a stripped static build)";
            let archives = archives()?;
            let program = stripped_program(&linked(&archives, &archives)?)?;
            Ok(Build {
                by_run: Fate::Unseen(SAYS.to_owned()),
                by_attach: Fate::Refused(SAYS.to_owned()),
                ..of_the_driver(name, vec![program], MODEL)
            })
        }),
        Planned::new("static, GCC, `GGML_LTO`", move |name| {
            Ok(of_the_driver(
                name,
                vec![linked(&lto()?, &archives()?)?],
                MODEL,
            ))
        }),
    ]);
    builds
}

/// Builds whose compiler or linkage decides which calls are left for a probe, each with all that the
/// routes need.
pub fn for_routes(root: &Path) -> Vec<Planned<'_>> {
    vec![
        Planned::new("routes: shared, GCC", move |_| {
            let ggml = llama::build(&llama::sources()?, &VULKAN)?;
            shared_oracle(root, "shared, GCC", &ggml)
        }),
        Planned::new("routes: static, GCC", move |_| {
            let sources = llama::sources()?;
            let ggml = llama::build(&sources, &VULKAN_STATIC)?;
            let program = linked(
                "oracle",
                &llama::oracle_source(root),
                llama::compile_oracle(&sources),
                &ggml,
                &llama::build(&sources, &STATIC)?,
                &["-lvulkan"],
            )?;
            of_the_oracle("static, GCC", program)
        }),
        Planned::new("routes: shared, Clang", move |_| {
            let ggml = llama::build(&llama::sources()?, &VULKAN_CLANG)?;
            shared_oracle(root, "shared, Clang, without OpenMP", &ggml)
        }),
    ]
}

/// The oracle with the shared libllama, and with a ggml that is put before the one beside that.
fn shared_oracle(root: &Path, name: &str, ggml: &Path) -> Result<Build> {
    let mut build = of_the_oracle(name, llama::provision(root)?.oracle)?;
    build
        .environment
        .insert("LD_LIBRARY_PATH".to_owned(), ggml.to_owned());
    Ok(build)
}

fn of_the_oracle(name: &str, program: PathBuf) -> Result<Build> {
    prebuilt::ensure_device()?;
    let shaders = (
        "MESA_SHADER_CACHE_DIR".to_owned(),
        prebuilt::shader_cache()?,
    );
    Ok(Build {
        driven: Driven::Oracle,
        environment: [shaders].into(),
        ..of_the_driver(name.to_owned(), vec![program], &[Model::Qwen3Moe])
    })
}

/// The driver with the shared libllama of a directory.
fn shared<'a>(
    root: &'a Path,
    name: &str,
    models: &'static [Model],
    directory: impl FnOnce() -> Result<PathBuf> + 'a,
) -> Planned<'a> {
    Planned::new(name, move |name| {
        let library = directory()?.join("libllama.so");
        let command = vec![driver::build(root)?, "--library".into(), library];
        Ok(of_the_driver(name, command, models))
    })
}

fn of_the_driver(name: String, command: Vec<PathBuf>, models: &[Model]) -> Build {
    Build {
        name,
        version: RELEASE.to_owned(),
        command,
        environment: Default::default(),
        driven: Driven::Lines,
        models: models.to_vec(),
        by_run: Fate::Equal,
        by_attach: Fate::Equal,
    }
}

/// The driver with all of llama.cpp in it: ggml's archives of one build, and libllama's of another.
fn linked_driver(source: &Path, ggml: &Path, llama: &Path) -> Result<PathBuf> {
    let mut compiler = Command::new(Compiler::System.c());
    compiler.args(["-O2", "-DLINKED"]);
    linked("driver", source, compiler, ggml, llama, &[])
}

/// A program with all of llama.cpp in it, and the libraries that its other backends take.
fn linked(
    name: &str,
    source: &Path,
    mut compiler: Command,
    ggml: &Path,
    llama: &Path,
    libraries: &[&str],
) -> Result<PathBuf> {
    let key = cache::key(&[
        &read(source)?,
        &Compiler::System.version()?,
        &ggml.to_string_lossy(),
        &llama.to_string_lossy(),
    ]);
    let built = cache::entry(&format!("{name}-static-{key}"), |partial| {
        fs::create_dir_all(partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        let object = partial.join("object.o");
        command::run(compiler.arg("-c").arg("-o").arg(&object).arg(source))?;
        command::run(
            Command::new(Compiler::System.cxx())
                .arg("-O2")
                .arg("-o")
                .arg(partial.join(name))
                .arg(&object)
                .arg(llama.join("libllama.a"))
                .arg("-Wl,--start-group")
                .args(archives(ggml)?)
                .arg("-Wl,--end-group")
                .args(libraries)
                .args(["-fopenmp", "-pthread", "-ldl", "-lm"]),
        )
    })?;
    Ok(built.join(name))
}

/// ggml itself and its backends.
fn archives(ggml: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(ggml).with_context(|| format!("cannot read {}", ggml.display()))?;
    let mut archives = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("libggml") && name.ends_with(".a") {
            archives.push(path);
        }
    }
    archives.sort();
    Ok(archives)
}

/// A program without any symbol.
fn stripped_program(program: &Path) -> Result<PathBuf> {
    let key = cache::key(&[&program.to_string_lossy()]);
    let stripped = cache::entry(&format!("driver-stripped-{key}"), |partial| {
        fs::create_dir_all(partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        let into = partial.join("driver");
        command::run(Command::new("strip").arg("-o").arg(into).arg(program))
    })?;
    Ok(stripped.join("driver"))
}

/// A ggml with a copy of libllama beside it, where the driver looks for both.
fn with_libllama(ggml: &Path, llama: &Path) -> Result<PathBuf> {
    let key = cache::key(&[&ggml.to_string_lossy(), &llama.to_string_lossy()]);
    cache::entry(&format!("with-libllama-{key}"), |partial| {
        cache::remove_directory(partial)?;
        command::run(Command::new("cp").arg("--archive").arg(ggml).arg(partial))?;
        command::run(
            Command::new("cp")
                .arg("--dereference")
                .arg(llama.join("libllama.so"))
                .arg(partial),
        )
    })
}

/// The shared libraries of a build, without `.symtab`.
fn stripped(bin: &Path) -> Result<PathBuf> {
    packages::ensure(&["binutils"], "a stripped build")?;
    let key = cache::key(&[&bin.to_string_lossy()]);
    cache::entry(&format!("llama.cpp-stripped-{key}"), |partial| {
        cache::remove_directory(partial)?;
        fs::create_dir_all(partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        strip_libraries(bin, partial)
    })
}

fn read(source: &Path) -> Result<String> {
    fs::read_to_string(source).with_context(|| format!("cannot read {}", source.display()))
}
