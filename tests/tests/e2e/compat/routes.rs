//! One route of expert ids after another, in builds in which compilers have left other calls for a
//! probe: do they come, by that route, and equal what follows from the tokens?

use anyhow::Context;
use expert_trace_tests::{
    builds::{Build, Driven, Model},
    routes::{Device, ROUTES, Route},
};
use serde::Serialize;

use super::{Found, LOAD, Load, Outcome, RESULT, by_attach, by_run};
use crate::{
    rpc::Server,
    support::{Known, known},
};

/// The device in software computes a hundred tokens in some seconds, and compiles shaders for each
/// length of prompts up to 8. Longer ones than 31 have weights streamed to the device.
const LOAD_OF_SOFTWARE: Load = Load {
    prompts: &[1, 40],
    decoded: 4,
};

/// What has become of a route in a build.
#[derive(Debug, Serialize)]
struct Row {
    route: &'static str,
    device: &'static str,
    build: String,
    version: String,
    #[serde(flatten)]
    by_run: Found,
    run: Outcome,
    attach: Outcome,
}

/// Whether a build is traced here.
pub fn are_for(build: &Build) -> bool {
    matches!(build.driven, Driven::Oracle)
}

/// The same build, with routers and experts where the route takes them to be.
fn placed(build: &Build, route: &Route, server: Option<&Server>) -> Build {
    let mut placed = build.clone();
    let command = &mut placed.command;
    command.extend(["-t", "2", "-c", "512"].map(Into::into));
    command.extend(route.options.iter().map(Into::into));
    if let Some(server) = server {
        command.extend(["--rpc".into(), server.endpoint().into()]);
    }
    command.push("-m".into());
    let devices = match route.device {
        Device::Vulkan => "0",
        Device::None | Device::Rpc => "",
    };
    let devices = [("GGML_VK_VISIBLE_DEVICES", devices)];
    for (name, value) in devices.iter().chain(route.environment) {
        placed.environment.insert((*name).to_owned(), value.into());
    }
    placed
}

fn trace(build: &Build, route: &Route, known: &Known) -> anyhow::Result<Row> {
    let server = (route.device == Device::Rpc).then(Server::start);
    let load = match route.device {
        Device::Vulkan => LOAD_OF_SOFTWARE,
        Device::None | Device::Rpc => LOAD,
    };
    let placed = placed(build, route, server.as_ref());
    let (run, found, _) = by_run(&placed, known, load).context("by run")?;
    let (attach, _) = by_attach(&placed, known, load).context("by attach")?;
    Ok(Row {
        route: route.name,
        device: route.device.name(),
        build: build.name.clone(),
        version: build.version.clone(),
        by_run: found,
        run,
        attach,
    })
}

#[test]
#[ignore = "builds llama.cpp for devices; run by `cargo xtask compat`"]
fn every_route() {
    let mut faults = Vec::new();
    let (spec, name) = Model::Qwen3Moe.spec();
    let known = known(&format!("compat-{name}.gguf"), spec);
    let builds = Build::list_from_env().unwrap();
    for route in &ROUTES {
        for build in builds.iter().filter(|build| are_for(build)) {
            let what = format!("{}, {}, {:?}", route.name, build.name, route.device);
            let row = match trace(build, route, &known) {
                Ok(row) => row,
                Err(error) => {
                    faults.push(format!("{what}: {error:#}"));
                    continue;
                }
            };
            println!("{RESULT}{}", serde_json::to_string(&row).unwrap());
            for (how, outcome) in [("run", &row.run), ("attach", &row.attach)] {
                if !outcome.equal || outcome.routes != route.routes {
                    let Route { routes, .. } = route;
                    faults.push(format!(
                        "{what}, by {how}: {outcome:?}, where equal ids by {routes:?} were expected"
                    ));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
