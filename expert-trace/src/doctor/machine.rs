//! Whether this machine, and we on it, can trace.

use super::{
    report::{Check, HitCosts},
    trial::{self, TrialError},
};
use crate::{
    attach::AttachError,
    launch::LaunchError,
    requirements::{self, Purpose, Unmet},
};

/// What was found out, before it is judged.
#[derive(Debug)]
pub struct Facts {
    /// Release of the kernel.
    pub release: String,
    /// Why it is too old, by its release alone.
    pub old: Option<Unmet>,
    /// Why there are no uprobes.
    pub uprobes: Option<Unmet>,
    /// The lockdown that is in force; none where the kernel does not show it.
    pub lockdown: Option<String>,
    /// Whether there is type information of the kernel.
    pub btf: bool,
    /// Missing capabilities.
    pub unmet: Option<Unmet>,
    /// Probes in our own process; none when capabilities are missing, without which nothing is tried.
    pub probes: Option<Result<HitCosts, TrialError>>,
    /// What `run` takes beside probes; none as above, or when it is not asked for.
    pub follow: Option<Result<(), TrialError>>,
    /// Whether it is about `run`.
    pub is_run: bool,
}

impl Facts {
    /// Finds them out, and tries what can be tried.
    pub fn gather(purpose: Purpose) -> Self {
        let unmet = requirements::missing_capabilities(purpose).or_else(requirements::foreign_proc);
        let uprobes = requirements::no_uprobes();
        let can_try = unmet.is_none() && uprobes.is_none();
        let is_run = purpose != Purpose::Attach;
        Self {
            release: requirements::release(),
            old: requirements::old_kernel(),
            uprobes,
            lockdown: requirements::lockdown(),
            btf: std::fs::File::open(BTF).is_ok(),
            unmet,
            probes: can_try.then(trial::trace_ourselves),
            follow: (can_try && is_run).then(trial::follow_a_child),
            is_run,
        }
    }

    /// Measured costs, where probes could be set.
    pub fn costs(&self) -> Option<HitCosts> {
        self.probes.as_ref()?.as_ref().ok().copied()
    }

    /// Judges them. `as_root` is the command line that asks again, with all rights.
    pub fn checks(&self, as_root: &str) -> Vec<Check> {
        let loaded = match &self.probes {
            Some(Err(TrialError::Attach(AttachError::Load(_) | AttachError::Unmet { .. }))) => {
                false
            }
            Some(_) => true,
            None => false,
        };
        let mut checks = vec![
            self.kernel(loaded),
            match &self.uprobes {
                None => Check::yes("uprobes", "the kernel has them"),
                Some(unmet) => Check::no("uprobes", unmet.to_string(), fix(unmet, as_root)),
            },
            self.lockdown(loaded),
            match &self.unmet {
                None => Check::yes("privileges", "the capabilities are there"),
                Some(unmet) => Check::no("privileges", unmet.to_string(), fix(unmet, as_root)),
            },
        ];
        checks.extend(self.tried(as_root));
        if self.is_run {
            checks.push(match self.btf {
                true => Check::yes("btf", format!("{BTF} can be read")),
                false => Check::no(
                    "btf",
                    format!("{BTF} cannot be read: the kernel has no type information (CONFIG_DEBUG_INFO_BTF)"),
                    ATTACH,
                ),
            });
            checks.extend(self.followed(as_root));
        }
        checks
    }

    fn kernel(&self, loaded: bool) -> Check {
        let finding = format!("Linux {} on {}", self.release, std::env::consts::ARCH);
        match &self.old {
            // Distributions carry newer features back.
            Some(unmet) if !loaded => Check::no("kernel", unmet.to_string(), NEWER),
            _ => Check::yes("kernel", finding),
        }
    }

    fn lockdown(&self, loaded: bool) -> Check {
        match self.lockdown.as_deref() {
            Some("confidentiality") if !loaded => {
                let unmet = Unmet::Lockdown;
                Check::no("lockdown", unmet.to_string(), fix(&unmet, ""))
            }
            Some(mode) => Check::yes(
                "lockdown",
                format!("{mode}: it does not forbid BPF programs"),
            ),
            None if loaded => Check::yes("lockdown", "none that forbids BPF programs"),
            None => Check::could_not_tell(
                "lockdown",
                "the kernel does not show it",
                "mount -t securityfs none /sys/kernel/security",
            ),
        }
    }

    /// BPF and a probe, as they were tried.
    fn tried(&self, as_root: &str) -> [Check; 2] {
        const BPF: &str = "bpf";
        const PROBE: &str = "probe";
        let bpf_works = || {
            Check::yes(
                BPF,
                "the programs were loaded, with a ring buffer and bpf_loop",
            )
        };
        match &self.probes {
            None => {
                let untried = "not tried without the above";
                [BPF, PROBE].map(|check| Check::could_not_tell(check, untried, as_root))
            }
            Some(Ok(costs)) => [
                bpf_works(),
                Check::yes(
                    PROBE,
                    format!(
                        "set in our own process, and every hit arrived; measured here, now: {:.0} ns a \
                         hit, {:.0} where the kernel single-steps, {:.0} on return",
                        costs.entry, costs.entry_single_stepped, costs.on_return
                    ),
                ),
            ],
            Some(Err(TrialError::Attach(error @ AttachError::Unmet { cause, .. }))) => [
                Check::no(BPF, error.to_string(), fix(cause, as_root)),
                Check::could_not_tell(PROBE, "not tried without BPF programs", fix(cause, as_root)),
            ],
            Some(Err(TrialError::Attach(error @ AttachError::Load(_)))) => [
                Check::no(BPF, error.to_string(), NEWER),
                Check::could_not_tell(PROBE, "not tried without BPF programs", NEWER),
            ],
            Some(Err(error)) => [bpf_works(), Check::no(PROBE, error.to_string(), HOST)],
        }
    }

    /// What `run` takes, as it was tried.
    fn followed(&self, as_root: &str) -> [Check; 2] {
        const FORKS: &str = "forks";
        const GATE: &str = "gate";
        let forks_work = || {
            Check::yes(
                FORKS,
                "a child was forked, and the tracepoint task_newtask told of it",
            )
        };
        match &self.follow {
            None => {
                let untried = "not tried without the above";
                [FORKS, GATE].map(|check| Check::could_not_tell(check, untried, as_root))
            }
            Some(Ok(())) => [
                forks_work(),
                Check::yes(GATE, "a child has waited behind a seccomp filter"),
            ],
            Some(Err(TrialError::Launch(error @ LaunchError::Gate(_)))) => {
                [forks_work(), Check::no(GATE, error.to_string(), ATTACH)]
            }
            Some(Err(error)) => [
                Check::no(FORKS, error.to_string(), ATTACH),
                Check::could_not_tell(GATE, "not tried without following forks", ATTACH),
            ],
        }
    }
}

const BTF: &str = "/sys/kernel/btf/vmlinux";
const NEWER: &str = "Linux 5.17 or newer";
const HOST: &str = "run expert-trace on the host, outside of any container";
const ATTACH: &str = "start the program, and: sudo expert-trace attach --pid PID";

/// What mends it.
fn fix(unmet: &Unmet, as_root: &str) -> String {
    match unmet {
        Unmet::Capabilities { .. } => as_root,
        Unmet::UserNamespace => HOST,
        Unmet::Proc => "mount -t proc proc /proc",
        Unmet::Uprobes => "a kernel with CONFIG_UPROBE_EVENTS=y, and: mount -t sysfs none /sys",
        Unmet::Bpf => "a kernel with CONFIG_BPF_SYSCALL=y, outside of any container",
        Unmet::RingBuffer(_) | Unmet::Kernel(_) => NEWER,
        Unmet::Lockdown => "start the machine without lockdown=confidentiality",
        Unmet::Forbidden => HOST,
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::{
        doctor::report::Answer::{self, CouldNotTell, No, Yes},
        requirements::Capability,
    };

    const AS_ROOT: &str = "sudo expert-trace doctor";

    fn facts() -> Facts {
        Facts {
            release: "6.18.4".to_owned(),
            old: None,
            uprobes: None,
            lockdown: Some("none".to_owned()),
            btf: true,
            unmet: None,
            probes: Some(Ok(HitCosts {
                entry: 800.0,
                entry_single_stepped: 20_000.0,
                on_return: 2600.0,
            })),
            follow: Some(Ok(())),
            is_run: true,
        }
    }

    fn answers(facts: &Facts) -> Vec<(&'static str, Answer)> {
        let checks = facts.checks(AS_ROOT);
        for check in &checks {
            assert_eq!(check.fix.is_none(), check.answer == Yes, "{check:?}");
        }
        checks.iter().map(|of| (of.check, of.answer)).collect()
    }

    /// The checks that are not answered with yes.
    fn wrong(facts: &Facts) -> Vec<(&'static str, Answer)> {
        let mut answers = answers(facts);
        answers.retain(|(_, answer)| *answer != Yes);
        answers
    }

    #[test]
    fn a_machine_that_traces() {
        let names: Vec<&str> = answers(&facts())
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let of_attach = [
            "kernel",
            "uprobes",
            "lockdown",
            "privileges",
            "bpf",
            "probe",
        ];
        assert_eq!(names, [&of_attach[..], &["btf", "forks", "gate"]].concat());
        assert_eq!(wrong(&facts()), []);
        let attach = Facts {
            is_run: false,
            follow: None,
            btf: false,
            ..facts()
        };
        assert_eq!(answers(&attach), of_attach.map(|name| (name, Yes)));
    }

    #[test]
    fn without_rights_nothing_is_tried() {
        let unmet = Unmet::Capabilities {
            missing: vec![Capability::SysAdmin],
            purpose: Purpose::Run,
        };
        let facts = Facts {
            unmet: Some(unmet),
            probes: None,
            follow: None,
            lockdown: None,
            ..facts()
        };
        let untried = ["bpf", "probe", "forks", "gate"].map(|name| (name, CouldNotTell));
        let expected = [("lockdown", CouldNotTell), ("privileges", No)];
        assert_eq!(wrong(&facts), [&expected[..], &untried].concat());
        let privileges = &facts.checks(AS_ROOT)[3];
        assert_eq!(privileges.fix.as_deref(), Some(AS_ROOT));
    }

    #[test]
    fn what_the_kernel_refused_is_named() {
        let with = |error: AttachError| Facts {
            probes: Some(Err(error.into())),
            ..facts()
        };
        let unmet = |cause| AttachError::Unmet {
            cause,
            answer: "no".to_owned(),
        };
        let both = [("bpf", No), ("probe", CouldNotTell)];
        assert_eq!(wrong(&with(unmet(Unmet::Forbidden))), both);
        assert_eq!(wrong(&with(AttachError::Load("no".to_owned()))), both);
        let old = Facts {
            old: Some(Unmet::Kernel("5.10.0".to_owned())),
            ..with(unmet(Unmet::RingBuffer(Errno::EINVAL)))
        };
        assert_eq!(wrong(&old), [&[("kernel", No)], &both[..]].concat());
        // What works is not too old.
        let carried_back = Facts {
            old: old.old,
            ..facts()
        };
        assert_eq!(wrong(&carried_back), []);
        let refused = AttachError::Probe {
            symbol: String::new(),
            file: String::new(),
            offset: 0,
            reason: String::new(),
        };
        assert_eq!(wrong(&with(refused)), [("probe", No)]);
        let lost = Facts {
            probes: Some(Err(TrialError::Lost {
                calls: 2,
                arrived: 1,
            })),
            ..facts()
        };
        assert_eq!(wrong(&lost), [("probe", No)]);
    }

    #[test]
    fn what_run_alone_takes() {
        let gate = Facts {
            follow: Some(Err(LaunchError::Gate(Errno::EBUSY).into())),
            ..facts()
        };
        assert_eq!(wrong(&gate), [("gate", No)]);
        let forks = Facts {
            follow: Some(Err(TrialError::ForkUnseen)),
            btf: false,
            ..facts()
        };
        let expected = [("btf", No), ("forks", No), ("gate", CouldNotTell)];
        assert_eq!(wrong(&forks), expected);
    }
}
