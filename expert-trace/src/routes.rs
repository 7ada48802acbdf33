//! The ways in which routing is read, and which of them a capture takes.

use expert_trace_common::Route;

/// Name of a route, in the document and on the command line.
pub const fn name(route: Route) -> &'static str {
    match route {
        Route::Router => "router",
        Route::SplitInput => "split_input",
        Route::Fetch => "fetch",
        Route::DeviceCopy => "device_copy",
        Route::Logits => "logits",
        Route::Callback => "callback",
    }
}

/// The route with this name.
pub fn of_name(wanted: &str) -> Option<Route> {
    let mut routes = Route::ALL.into_iter();
    routes.find(|route| name(*route) == wanted)
}

/// A set of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routes {
    all: u32,
    /// Those that were named, and not just left in.
    named: u32,
}

impl Default for Routes {
    /// All, but for the one that is a choice of our own and has to be asked for.
    fn default() -> Self {
        Self::of(&Route::ALL).without(Route::Logits)
    }
}

impl Routes {
    /// These.
    pub fn of(routes: &[Route]) -> Self {
        let all = routes
            .iter()
            .fold(0, |bits, route| bits | Self::bit(*route));
        Self { all, named: 0 }
    }

    /// Those of the command line, where all are meant when none is named; `logits` tells whether the
    /// target computes router logits on the CPU.
    pub fn asked_for(named: &[Route], logits: bool) -> Self {
        let all = match named {
            [] => Self::of(&Route::ALL).all,
            named => Self::of(named).all,
        };
        let logits_are_wanted = logits && all & Self::bit(Route::Logits) != 0;
        let named = Self::of(named).all;
        let asked = match logits_are_wanted {
            true => named | Self::bit(Route::Logits),
            false => named,
        };
        let asked = Self { all, named: asked };
        match logits {
            true => asked,
            false => asked.without(Route::Logits),
        }
    }

    /// Adds one.
    pub fn insert(&mut self, route: Route) {
        self.all |= Self::bit(route);
    }

    /// Whether it was asked for by itself: it is to be read also where nothing tells that it can show
    /// anything.
    pub const fn has_named(self, route: Route) -> bool {
        self.named & Self::bit(route) != 0
    }

    /// Whether this one is among them.
    pub const fn has(self, route: Route) -> bool {
        self.all & Self::bit(route) != 0
    }

    /// By their numbers' bits, as the BPF programs know them.
    pub const fn bits(self) -> u32 {
        self.all
    }

    /// They, in the order of their numbers.
    pub fn iter(self) -> impl Iterator<Item = Route> {
        Route::ALL.into_iter().filter(move |route| self.has(*route))
    }

    const fn without(self, route: Route) -> Self {
        let Self { all, named } = self;
        let others = !Self::bit(route);
        Self {
            all: all & others,
            named: named & others,
        }
    }

    const fn bit(route: Route) -> u32 {
        1 << route as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for route in Route::ALL {
            assert_eq!(of_name(name(route)), Some(route));
        }
        assert_eq!(of_name("Router"), None);
    }

    #[test]
    fn logits_have_to_be_there() {
        let named = [Route::Router, Route::Logits];
        assert_eq!(Routes::asked_for(&[], false), Routes::default());
        assert!(Routes::asked_for(&[], true).has(Route::Logits));
        assert!(Routes::asked_for(&named, false).iter().eq([Route::Router]));
        assert!(Routes::asked_for(&named, true).iter().eq(named));
        assert_eq!(Routes::of(&named).bits(), 0b1_0001);
    }

    #[test]
    fn what_is_asked_for_is_not_just_left_in() {
        let named = |named: &[Route], logits| {
            let routes = Routes::asked_for(named, logits);
            let named = routes.iter().filter(|route| routes.has_named(*route));
            named.collect::<Vec<_>>()
        };
        assert_eq!(named(&[], false), []);
        assert_eq!(named(&[], true), [Route::Logits]);
        assert_eq!(named(&[Route::Fetch], true), [Route::Fetch]);
    }
}
