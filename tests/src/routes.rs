//! Routes by which expert ids can come to the host, and where routers and experts have to be for that.

use expert_trace::router_on_cpu::{NO_FUSION_VARIABLE, OVERRIDE};

/// What `tests/oracle/oracle.cpp` is told, and what has to come of it.
#[derive(Debug)]
pub struct Route {
    /// As the document names it, and the table.
    pub name: &'static str,
    /// What has the routers or experts that are not on the CPU.
    pub device: Device,
    /// Options of the oracle.
    pub options: &'static [&'static str],
    /// Added to its environment.
    pub environment: &'static [(&'static str, &'static str)],
    /// By which rows have to come, in alphabetical order: short passes can take another than long ones.
    pub routes: &'static [&'static str],
}

/// What computes beside the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Nothing does.
    None,
    /// An RPC server on the loopback interface.
    Rpc,
    /// A Vulkan device, in software where there is no other.
    Vulkan,
}

impl Device {
    /// As the table names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "–",
            Self::Rpc => "RPC",
            Self::Vulkan => "Vulkan",
        }
    }
}

const EXPERTS_ON_CPU: &str = "ffn_.*_exps=CPU";

/// All of them but that of CUDA, which needs a GPU of NVIDIA's.
pub const ROUTES: [Route; 8] = [
    Route {
        name: "router",
        device: Device::None,
        options: &[],
        environment: &[],
        routes: &["router"],
    },
    Route {
        name: "split_input",
        device: Device::Rpc,
        options: &["-ngl", "99", "--op-offload", "0", "-ot", EXPERTS_ON_CPU],
        environment: &[],
        routes: &["split_input"],
    },
    Route {
        name: "split_input",
        device: Device::Vulkan,
        options: &["-ngl", "99", "--op-offload", "0", "-ot", EXPERTS_ON_CPU],
        environment: &[],
        routes: &["split_input"],
    },
    // Long prompts have their weights streamed to the device; the rest is computed on the CPU.
    Route {
        name: "fetch",
        device: Device::Vulkan,
        options: &["-ngl", "99", "-ot", EXPERTS_ON_CPU],
        environment: &[],
        routes: &["fetch", "split_input"],
    },
    Route {
        name: "logits",
        device: Device::Rpc,
        options: &["-ngl", "99", "--op-offload", "0", "-ot", OVERRIDE],
        environment: &[],
        routes: &["logits"],
    },
    Route {
        name: "logits",
        device: Device::Vulkan,
        options: &["-ngl", "99", "--op-offload", "0", "-ot", OVERRIDE],
        environment: &[(NO_FUSION_VARIABLE, "1")],
        routes: &["logits"],
    },
    // Everything is on the device, and a callback of the oracle asks for the ids.
    Route {
        name: "callback",
        device: Device::Rpc,
        options: &["-ngl", "99", "--op-offload", "0", "--count", "1"],
        environment: &[],
        routes: &["callback"],
    },
    Route {
        name: "callback",
        device: Device::Vulkan,
        options: &["-ngl", "99", "--count", "1"],
        environment: &[],
        routes: &["callback"],
    },
];
