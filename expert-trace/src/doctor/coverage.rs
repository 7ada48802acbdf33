//! Which routes the probes of a plan can serve, and which layers are expected to be seen by them. Pure.

use expert_trace_common::Route;
use serde::Serialize;

use super::report::Answer;
use crate::{
    gguf::ModelShape,
    placement::{Options, Place, Role},
    probes::{Hook, Plan},
    remedy::{self, Layers, Need, Program, Remedy},
    routes::{self, Routes},
    stats::ModelFile,
    visibility::{self, OWN_OVERRIDE},
};

/// Whether a route can be served.
#[derive(Clone, Debug, Serialize)]
pub struct RouteReport {
    /// Its name, as in the counts' document.
    pub route: &'static str,
    /// Whether its hooks were found, and are known to be called in every build.
    pub answer: Answer,
    /// What it needs.
    pub hooks: &'static [Hook],
    /// Why it can, or what is missing.
    pub finding: String,
}

/// Hooks without which a route shows nothing.
const fn needs(route: Route) -> &'static [Hook] {
    match route {
        Route::Router => &[Hook::ExpertIds],
        Route::SplitInput => &[Hook::Split],
        Route::Fetch => &[Hook::Fetch, Hook::WeightsFollow],
        Route::DeviceCopy => &[Hook::DeviceMulMatId, Hook::DeviceMemcpy],
        Route::Logits => &[Hook::Split, Hook::SplitDone],
        Route::Callback => &[Hook::TensorGet, Hook::TensorGetDone],
    }
}

/// What a route shows.
const fn shows(route: Route) -> &'static str {
    match route {
        Route::Router => "ids of routers on the CPU",
        Route::SplitInput => "ids that a device has chosen for experts on the CPU",
        Route::Fetch => "ids by which the scheduler streams experts to a device (prompts)",
        Route::DeviceCopy => "ids that CUDA copies to the host for itself",
        Route::Logits => "choices made from router logits on the CPU",
        Route::Callback => "ids that the program's own eval callback asks for",
    }
}

/// Whether each route can be served by what a plan has found, in the order of [`Route::ALL`].
pub fn routes(plan: &Plan) -> Vec<RouteReport> {
    Route::ALL
        .into_iter()
        .map(|route| {
            let (answer, finding) = judge(route, plan);
            RouteReport {
                route: routes::name(route),
                answer,
                hooks: needs(route),
                finding: format!("{}: {finding}", shows(route)),
            }
        })
        .collect()
}

fn judge(route: Route, plan: &Plan) -> (Answer, String) {
    if !plan.routes().has(route) {
        let text = match route {
            Route::Logits => {
                "takes --router-on-cpu, and then one more probe, on the return of \
                 ggml_graph_compute"
            }
            _ => "left out by --routes",
        };
        return (Answer::No, text.to_owned());
    }
    let found = |hook: Hook| plan.found(hook).next().is_some();
    let missing: Vec<&str> = needs(route)
        .iter()
        .filter(|hook| !found(**hook))
        .map(|hook| hook.symbols()[0])
        .collect();
    if !missing.is_empty() {
        return (Answer::No, format!("no {} was found", missing.join(", ")));
    }
    if !needs(route).iter().all(|hook| plan.has(*hook)) {
        let text = "the functions were found, and are probed once the program has a device that can \
                    need it";
        return (Answer::Yes, text.to_owned());
    }
    if route == Route::Fetch && !visibility::sees_streams(plan.probes.iter()) {
        let text = "compilers can put ggml_backend_tensor_get_async and …_set_async into their \
                    callers, where nothing hits the probes";
        return (Answer::CouldNotTell, text.to_owned());
    }
    if route == Route::Callback {
        let text = "the functions were found; one probe is on a return, which is hit whenever the \
                    program asks for a tensor";
        return (Answer::Yes, text.to_owned());
    }
    (Answer::Yes, "the functions were found".to_owned())
}

/// What is expected of layers of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Expectation {
    /// Index of the model.
    pub model: usize,
    /// The layers, ascending.
    pub layers: Vec<u32>,
    /// Whether all of their routing will be seen.
    pub answer: Answer,
    /// Routes by which it is expected.
    pub routes: Vec<&'static str>,
    /// Why.
    pub finding: String,
    /// What to change, in words; none where all is seen.
    pub fix: Option<String>,
    /// Options for it, best first; each is enough.
    pub remedies: Vec<Remedy>,
    /// Whether the layers run without being asked for; those for multi-token prediction do not.
    pub always_run: bool,
}

/// What is known of a target.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Its command line's options.
    pub options: &'a Options,
    /// Device backends it has, or may load.
    pub devices: &'a [String],
    /// The routes, in the order of [`Route::ALL`].
    pub routes: &'a [RouteReport],
    /// Those that are read.
    pub read: Routes,
    /// Index of the model that the options are about; others, such as a draft model, have their own.
    pub main_model: Option<usize>,
    /// Whether ids by which weights are streamed to a device are certain to be seen.
    pub sees_streams: bool,
    /// Whether router logits are read.
    pub router_on_cpu: bool,
    /// Whether the program runs already.
    pub attached: bool,
}

/// What is expected of the layers with experts of each model, those alike together.
pub fn expectations(models: &[ModelFile], facts: &Facts<'_>) -> Vec<Expectation> {
    let mut all = Vec::new();
    for (model, ModelFile { shape, .. }) in models.iter().enumerate() {
        let mut alike: Vec<(Outlook, bool, Vec<u32>)> = Vec::new();
        for layer in &shape.moe_layers {
            let outlook = if facts.main_model == Some(model) {
                facts.outlook(*layer, shape)
            } else {
                facts.outlook_of_another()
            };
            let always_run = *layer < shape.main_layers();
            match alike
                .iter_mut()
                .find(|of| (&of.0, of.1) == (&outlook, always_run))
            {
                Some((.., layers)) => layers.push(*layer),
                None => alike.push((outlook, always_run, vec![*layer])),
            }
        }
        let expected = alike.into_iter().map(|(outlook, always_run, layers)| {
            let wanted = &layers;
            let (fix, remedies) = facts.fix(outlook.fix, Layers { wanted, shape });
            Expectation {
                model,
                layers,
                answer: outlook.answer,
                routes: outlook.routes.into_iter().map(routes::name).collect(),
                finding: outlook.finding,
                fix,
                remedies,
                always_run,
            }
        });
        all.extend(expected);
    }
    all
}

/// What is expected of one layer.
#[derive(Debug, PartialEq)]
struct Outlook {
    answer: Answer,
    routes: Vec<Route>,
    finding: String,
    fix: Option<Fix>,
}

/// What to change.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fix {
    /// Options, by what keeps the layer out of sight.
    Options(Need),
    Text(&'static str),
}

impl Outlook {
    fn unknown(finding: &str, fix: Fix) -> Self {
        Self {
            answer: Answer::CouldNotTell,
            routes: Vec::new(),
            finding: finding.to_owned(),
            fix: Some(fix),
        }
    }

    fn hidden(finding: String, fix: Fix) -> Self {
        Self {
            answer: Answer::No,
            routes: Vec::new(),
            finding,
            fix: Some(fix),
        }
    }
}

const BUILD: Fix = Fix::Text("use a build with shared libraries, or one that is not stripped");
const WITHOUT_ROUTES: Fix = Fix::Text("trace without --routes");
const TRACE_IT: Fix = Fix::Text("trace it: the summary names what is not visible");
const OFF_THE_DEVICE: Fix = Fix::Options(Need::OffTheDevice);

impl Facts<'_> {
    fn answer(&self, route: Route) -> Answer {
        self.routes[route as usize].answer
    }

    /// In words, and as options.
    fn fix(&self, fix: Option<Fix>, layers: Layers<'_>) -> (Option<String>, Vec<Remedy>) {
        let program = Program {
            options: self.options,
            role: Some(Role::Main),
            sees_streams: self.sees_streams || !self.streams(),
            router_on_cpu: self.router_on_cpu,
            attached: self.attached,
        };
        let remedies = match fix {
            Some(Fix::Options(need)) => remedy::remedies(need, Some(layers), &program),
            Some(Fix::Text(_)) | None => Vec::new(),
        };
        let text = fix.map(|fix| match (fix, remedies.as_slice()) {
            (Fix::Text(text), _) => text.to_owned(),
            (Fix::Options(_), []) => OWN_OVERRIDE.to_owned(),
            (Fix::Options(_), remedies) => remedy::sentence(remedies),
        });
        (text, remedies)
    }

    /// Seen by all of these routes together, as far as their hooks go.
    fn seen(&self, routes: &[Route], finding: &str, fix: Fix) -> Outlook {
        let answer = Answer::worst(routes.iter().map(|route| self.answer(*route)));
        let lacking = routes
            .iter()
            .filter(|route| self.answer(**route) != Answer::Yes);
        let lacking: Vec<&str> = lacking
            .map(|route| self.routes[*route as usize].finding.as_str())
            .collect();
        let finding = match lacking.as_slice() {
            [] => finding.to_owned(),
            lacking => format!("{finding}; {}", lacking.join("; ")),
        };
        let is_left_out = |route: &Route| *route != Route::Logits && !self.read.has(*route);
        let fix = match routes.iter().any(is_left_out) {
            true => WITHOUT_ROUTES,
            false => fix,
        };
        Outlook {
            answer,
            routes: routes.to_vec(),
            finding,
            fix: (answer != Answer::Yes).then_some(fix),
        }
    }

    fn devices(&self) -> String {
        self.devices.join(", ")
    }

    fn has_device(&self) -> bool {
        !self.devices.is_empty() && !self.options.uses_no_device()
    }

    /// Whether weights are streamed to a device. RPC servers take none (ggml-rpc.cpp, `offload_op`).
    fn streams(&self) -> bool {
        self.options.streams() && self.devices.iter().any(|device| device != "rpc")
    }

    /// Experts in the host's memory: prompts that are long have them streamed.
    fn and_streamed(&self, routes: &[Route]) -> Vec<Route> {
        let streamed = self.streams().then_some(Route::Fetch);
        routes.iter().copied().chain(streamed).collect()
    }

    fn outlook(&self, layer: u32, shape: &ModelShape) -> Outlook {
        const NO_OFFLOAD: Fix = Fix::Options(Need::NotStreamed);
        if !self.has_device() {
            return self.seen(&[Route::Router], "computed on the CPU", BUILD);
        }
        let place = |part: &str| self.options.overridden(&format!("blk.{layer}.{part}"));
        let on = self.options.layer(layer, shape.layers);
        let router = place("ffn_gate_inp.weight");
        let experts = ["up", "gate", "down"]
            .map(|part| place(&format!("ffn_{part}_exps.weight")).unwrap_or(on));
        let experts_on_host = experts.contains(&Place::Host);
        let on_host = router.unwrap_or(on) == Place::Host;
        if on_host && on != Place::Host {
            return self.outlook_by_logits(layer, shape, &place);
        }
        match on {
            _ if router.is_some_and(|router| router != on) => Outlook::unknown(
                "an --override-tensor puts the router where it cannot be told who chooses",
                Fix::Text("leave ffn_gate_inp to --router-on-cpu"),
            ),
            Place::Host => {
                let fix = match self.answer(Route::Router) {
                    Answer::Yes => NO_OFFLOAD,
                    _ => BUILD,
                };
                let routes = self.and_streamed(&[Route::Router]);
                self.seen(&routes, "the layer is on the CPU", fix)
            }
            Place::Device if experts_on_host => self.seen(
                &self.and_streamed(&[Route::SplitInput]),
                "router on a device, experts on the CPU",
                NO_OFFLOAD,
            ),
            Place::Unknown if experts_on_host => self.seen(
                &self.and_streamed(&[Route::Router, Route::SplitInput]),
                "experts on the CPU, router there or on a device",
                NO_OFFLOAD,
            ),
            Place::Device | Place::Unknown if !experts_on_host && self.options.asks_for_ids => {
                let finding = "the program's eval callback asks for the ids, wherever they are";
                self.seen(&[Route::Callback], finding, OFF_THE_DEVICE)
            }
            Place::Device if experts == [Place::Device; 3] => {
                let part = match self.answer(Route::DeviceCopy) {
                    Answer::No => "",
                    _ => "; of F16, BF16 and F32 experts, long prompts are seen (device_copy)",
                };
                let devices = self.devices();
                Outlook::hidden(
                    format!("router and experts on a device ({devices}), if there is one{part}"),
                    OFF_THE_DEVICE,
                )
            }
            _ if !self.options.understood => Outlook::unknown(
                "the program has device backends, and is not known to take llama.cpp's options",
                TRACE_IT,
            ),
            Place::Unknown => Outlook::unknown(
                match self.options.is_fitted() {
                    true => "llama.cpp decides by the device's free memory where the layer goes",
                    false => {
                        "the layer is at the edge of what -ngl counts: builds differ in whether it \
                         is on the device"
                    }
                },
                OFF_THE_DEVICE,
            ),
            Place::Device => Outlook::unknown(
                "an --override-tensor puts experts where it cannot be told where they are",
                OFF_THE_DEVICE,
            ),
        }
    }

    /// The router's logits are computed on the host, the choice is made where the layer is.
    fn outlook_by_logits(
        &self,
        layer: u32,
        shape: &ModelShape,
        place: &dyn Fn(&str) -> Option<Place>,
    ) -> Outlook {
        const ADD_BIAS: Fix = Fix::Text("let --router-on-cpu choose the --override-tensor");
        if shape.chosen_by_token.contains(&layer) {
            let finding = "the layer chooses by token, not by logits".to_owned();
            return Outlook::hidden(finding, OFF_THE_DEVICE);
        }
        for (layers, tensor) in [
            (&shape.router_bias, "ffn_gate_inp.bias"),
            (&shape.selection_bias, "exp_probs_b.bias"),
        ] {
            if layers.contains(&layer) && place(tensor) != Some(Place::Host) {
                let finding =
                    format!("the router's logits are on the CPU, and its {tensor} is not");
                return Outlook::hidden(finding, ADD_BIAS);
            }
        }
        let mut outlook = self.seen(
            &[Route::Logits],
            "router logits on the CPU, from which the choice is made",
            Fix::Text("trace with --router-on-cpu"),
        );
        if self.streams() && outlook.answer == Answer::Yes {
            outlook.answer = Answer::CouldNotTell;
            outlook.finding += "; a device may compute those of prompts";
            outlook.fix = Some(Fix::Options(Need::NotStreamed));
        }
        outlook
    }

    fn outlook_of_another(&self) -> Outlook {
        if self.has_device() {
            Outlook::unknown(
                "a further model, whose place other options decide",
                TRACE_IT,
            )
        } else {
            self.seen(&[Route::Router], "computed on the CPU", BUILD)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::{
        Answer::{CouldNotTell, No, Yes},
        *,
    };

    fn shape() -> ModelShape {
        ModelShape::with_experts_in(4, &[0, 1, 2, 3])
    }

    fn model(shape: ModelShape) -> ModelFile {
        ModelFile {
            path: "/m.gguf".to_owned(),
            found: "command_line",
            shape,
        }
    }

    /// Routes as a shared build of CUDA has them: every function found, but for those that `lacking`.
    fn served(lacking: &[Route], reads_logits: bool) -> Vec<RouteReport> {
        Route::ALL
            .into_iter()
            .map(|route| RouteReport {
                route: routes::name(route),
                answer: match route {
                    Route::Logits if !reads_logits => No,
                    _ if lacking.contains(&route) => No,
                    _ => Yes,
                },
                hooks: needs(route),
                finding: "not there".to_owned(),
            })
            .collect()
    }

    struct Setup {
        shape: ModelShape,
        devices: Vec<String>,
        lacking: Vec<Route>,
        reads_logits: bool,
        read: Routes,
        main_model: Option<usize>,
    }

    impl Setup {
        fn gpu() -> Self {
            Self {
                shape: shape(),
                devices: vec!["cuda".to_owned()],
                lacking: Vec::new(),
                reads_logits: false,
                read: Routes::default(),
                main_model: Some(0),
            }
        }

        fn expect(&self, command: &str) -> Vec<(Vec<u32>, Answer, Vec<&'static str>)> {
            let expected = self.expectations(command).into_iter();
            let told = expected.map(|of| {
                assert_eq!(of.fix.is_none(), of.answer == Yes, "{of:?}");
                (of.layers, of.answer, of.routes)
            });
            told.collect()
        }

        fn expectations(&self, command: &str) -> Vec<Expectation> {
            let words: Vec<OsString> = command.split(' ').map(OsString::from).collect();
            let options = Options::parse(&words, |_| None);
            let routes = served(&self.lacking, self.reads_logits);
            let facts = Facts {
                options: &options,
                devices: &self.devices,
                routes: &routes,
                read: self.read,
                main_model: self.main_model,
                sees_streams: !self.lacking.contains(&Route::Fetch),
                router_on_cpu: self.reads_logits,
                attached: false,
            };
            expectations(&[model(self.shape.clone())], &facts)
        }
    }

    fn all() -> Vec<u32> {
        vec![0, 1, 2, 3]
    }

    #[test]
    fn without_a_device_all_is_seen() {
        let mut setup = Setup::gpu();
        setup.devices.clear();
        let by_router = [(all(), Yes, vec!["router"])];
        assert_eq!(setup.expect("python3 serve.py"), by_router);
        assert_eq!(setup.expect("llama-cli -ngl 99"), by_router);
        assert_eq!(Setup::gpu().expect("llama-cli -dev none"), by_router);
        let no_offload = "llama-cli -ngl 0 --no-op-offload";
        assert_eq!(Setup::gpu().expect(no_offload), by_router);
        setup.main_model = None;
        assert_eq!(setup.expect("llama-cli -ngl 99"), by_router);
        setup.lacking = vec![Route::Router];
        assert_eq!(setup.expect("llama-cli"), [(all(), No, vec!["router"])]);
    }

    #[test]
    fn options_decide_what_a_device_hides() {
        let setup = Setup::gpu();
        assert_eq!(setup.expect("llama-cli -ngl 99"), [(all(), No, vec![])]);
        assert_eq!(setup.expect("llama-cli"), [(all(), CouldNotTell, vec![])]);
        let draft = Setup {
            main_model: None,
            ..Setup::gpu()
        };
        assert_eq!(
            draft.expect("llama-cli -ngl 0"),
            [(all(), CouldNotTell, vec![])]
        );
        assert_eq!(
            setup.expect("python3 -ngl 99"),
            [(all(), CouldNotTell, vec![])]
        );
        assert_eq!(
            setup.expect("llama-cli -ngl 99 --cpu-moe"),
            [(all(), Yes, vec!["split_input", "fetch"])]
        );
        assert_eq!(
            setup.expect("llama-cli --cpu-moe --no-op-offload"),
            [(all(), Yes, vec!["router", "split_input"])]
        );
        assert_eq!(
            setup.expect("llama-cli -ngl 99 -ncmoe 2"),
            [
                (vec![0, 1], Yes, vec!["split_input", "fetch"]),
                (vec![2, 3], No, vec![])
            ]
        );
        assert_eq!(
            setup.expect("llama-cli -ngl 2"),
            [
                (vec![0, 1], Yes, vec!["router", "fetch"]),
                (vec![2], CouldNotTell, vec![]),
                (vec![3], No, vec![])
            ]
        );
    }

    #[test]
    fn why_the_place_of_a_layer_is_not_known_is_told() {
        let setup = Setup::gpu();
        let edge = &setup.expectations("llama-cli -ngl 2")[1];
        assert_eq!((&edge.layers[..], edge.answer), (&[2][..], CouldNotTell));
        assert!(edge.finding.starts_with("the layer is at the edge"));
        let fitted = &setup.expectations("llama-cli")[0].finding;
        assert!(fitted.contains("free memory"), "{fitted}");
        let own = &setup.expectations("llama-cli -ngl 99 -ot (?!blk)=CPU")[0];
        assert!(own.finding.starts_with("an --override-tensor"), "{own:?}");
        // Nothing is fitted: all layers go to the device.
        let off = setup.expect("llama-cli --fit off");
        assert_eq!(off, [(all(), No, vec![])]);
    }

    #[test]
    fn a_route_that_is_left_out_takes_no_other_build() {
        let setup = Setup {
            devices: Vec::new(),
            lacking: vec![Route::Router],
            read: Routes::of(&[Route::SplitInput]),
            ..Setup::gpu()
        };
        let fix = |setup: &Setup| setup.expectations("llama-cli")[0].fix.clone().unwrap();
        assert_eq!(fix(&setup), "trace without --routes");
        let read = Routes::default();
        let build = fix(&Setup { read, ..setup });
        assert!(build.starts_with("use a build"));
    }

    #[test]
    fn streamed_weights_need_their_hooks() {
        let mut setup = Setup::gpu();
        setup.lacking = vec![Route::Fetch];
        let by = vec!["split_input", "fetch"];
        assert_eq!(
            setup.expect("llama-cli -ngl 99 --cpu-moe"),
            [(all(), No, by)]
        );
        assert_eq!(
            setup.expect("llama-cli -ngl 99 --cpu-moe --no-op-offload"),
            [(all(), Yes, vec!["split_input"])]
        );
    }

    #[test]
    fn logits_tell_what_biases_and_offload_let_them() {
        let mut setup = Setup::gpu();
        setup.reads_logits = true;
        let with = |pattern: &str| {
            format!("llama-cli -ngl 99 -ot blk\\.[0-9]+\\.{pattern}=CPU --no-op-offload")
        };
        let seen = [(all(), Yes, vec!["logits"])];
        assert_eq!(setup.expect(&with("ffn_gate_inp.weight")), seen);
        let offloaded = with("ffn_gate_inp.weight").replace(" --no-op-offload", "");
        assert_eq!(
            setup.expect(&offloaded),
            [(all(), CouldNotTell, vec!["logits"])]
        );
        setup.shape.selection_bias = [3].into();
        assert_eq!(
            setup.expect(&with("ffn_gate_inp.weight")),
            [(vec![0, 1, 2], Yes, vec!["logits"]), (vec![3], No, vec![])]
        );
        assert_eq!(setup.expect(&with("(ffn_gate_inp|exp_probs_b).*")), seen);
        setup.reads_logits = false;
        assert_eq!(
            setup.expect(&with("(ffn_gate_inp|exp_probs_b).*")),
            [(all(), No, vec!["logits"])]
        );
    }

    #[test]
    fn blocks_that_predict_further_tokens_are_apart() {
        let mut setup = Setup::gpu();
        setup.devices.clear();
        setup.shape.nextn_predict_layers = 1;
        let expected = [
            (vec![0, 1, 2], Yes, vec!["router"]),
            (vec![3], Yes, vec!["router"]),
        ];
        assert_eq!(setup.expect("llama-cli"), expected);
    }

    #[test]
    fn ids_that_the_program_asks_for_are_seen_on_a_device() {
        let mut setup = Setup::gpu();
        let expected = [(vec![0, 1, 2, 3], Yes, vec!["callback"])];
        assert_eq!(setup.expect("llama-imatrix -ngl 99"), expected);
        setup.lacking = vec![Route::Callback];
        assert_eq!(setup.expect("llama-imatrix -ngl 99")[0].1, No);
    }

    #[test]
    fn the_return_probe_is_for_logits_alone() {
        let of = |routes| super::routes(&Plan::default().with_routes(routes));
        let none = of(Routes::asked_for(&[], true));
        assert!(none.iter().all(|route| route.answer == No));
        let names: Vec<&str> = none.iter().map(|route| route.route).collect();
        assert_eq!(
            names,
            [
                "router",
                "split_input",
                "fetch",
                "device_copy",
                "logits",
                "callback"
            ]
        );
        let without = &of(Routes::default())[Route::Logits as usize];
        assert!(without.finding.contains("--router-on-cpu"), "{without:?}");
    }
}
