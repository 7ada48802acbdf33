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
pub struct Routes(u32);

impl Default for Routes {
    /// All, but for the one that is a choice of our own and has to be asked for.
    fn default() -> Self {
        Self::of(&Route::ALL).without(Route::Logits)
    }
}

impl Routes {
    /// These.
    pub fn of(routes: &[Route]) -> Self {
        Self(
            routes
                .iter()
                .fold(0, |bits, route| bits | Self::bit(*route)),
        )
    }

    /// Those of the command line, where all are meant when none is named; `logits` tells whether the
    /// target computes router logits on the CPU.
    pub fn asked_for(named: &[Route], logits: bool) -> Self {
        let asked = match named {
            [] => Self::of(&Route::ALL),
            named => Self::of(named),
        };
        match logits {
            true => asked,
            false => asked.without(Route::Logits),
        }
    }

    /// Adds one.
    pub fn insert(&mut self, route: Route) {
        self.0 |= Self::bit(route);
    }

    /// Whether this one is among them.
    pub const fn has(self, route: Route) -> bool {
        self.0 & Self::bit(route) != 0
    }

    /// By their numbers' bits, as the BPF programs know them.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// They, in the order of their numbers.
    pub fn iter(self) -> impl Iterator<Item = Route> {
        Route::ALL.into_iter().filter(move |route| self.has(*route))
    }

    const fn without(self, route: Route) -> Self {
        Self(self.0 & !Self::bit(route))
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
}
