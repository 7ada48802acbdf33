//! The balance of a capture: what the kernel has counted, what arrived of it, and what is missing.

use expert_trace_common::Counter;
use serde::Serialize;

use crate::{
    attach::Counters,
    model::{FromLogits, Received},
};

/// The kernel's counters, what arrived of it, and whether the sums are right.
#[derive(Debug, Serialize)]
pub struct Integrity {
    /// Whether all that was seen is counted: the sums are right and nothing was lost.
    pub complete: bool,
    /// What is wrong, if anything, in words.
    pub problems: Vec<String>,
    /// Entries of `ggml_compute_forward_get_rows`.
    pub hits: Hits,
    /// What the other ways to read routing have shown.
    pub routes: Routes,
    /// Choices made from router logits.
    pub logits: Logits,
    /// Records: `seen = emitted + dropped`.
    pub events: Flow,
    /// Rows: `seen = emitted + dropped`.
    pub rows: Flow,
    /// Entries for expert ids of which not even the number of rows is known.
    pub unknown_rows: UnknownRows,
    /// What the program read from the ring buffer.
    pub received: Received,
    /// Size of the ring buffer, in bytes.
    pub ring_buffer_bytes: u32,
}

/// Entries of `ggml_compute_forward_get_rows`, by what became of them.
#[derive(Debug, Default, Serialize)]
pub struct Hits {
    /// All.
    pub entered: u64,
    /// On another thread than the first of its pool.
    pub filtered_thread: u64,
    /// For another tensor.
    pub filtered_tensor: u64,
    /// For the embedding lookup.
    pub token_lookup: u64,
    /// Parameters or tensors could not be read.
    pub unreadable: u64,
    /// Before the layout was known, and for no tensor that would have shown it.
    pub layout_unknown: u64,
    /// For expert ids.
    pub routed: u64,
    /// Passes begun by a scheduler, of all graphs.
    pub passes: u64,
    /// Passes whose ubatch was to be read and could not be.
    pub ubatch_unreadable: u64,
    /// Times a kernel map was full.
    pub state_lost: u64,
}

/// What was seen where a router does not run on the CPU, or not all of it.
#[derive(Debug, Serialize)]
pub struct Routes {
    /// Entries of `ggml_graph_compute`: the CPU's parts of graphs.
    pub splits: u64,
    /// Those of them with expert ids among their inputs.
    pub split_inputs: u64,
    /// Those of them that computed router logits which were read.
    pub split_logits: u64,
    /// Copies of expert ids to the host that a device was asked for.
    pub ids_copies: u64,
    /// Those of them that were read, for the scheduler.
    pub fetches: u64,
    /// Those of them that were read, for the device.
    pub device_copies: u64,
    /// Those of them that were read, for the target's own code.
    pub callback_copies: u64,
    /// Those of them whose arrival was not seen.
    pub copies_lost: u64,
    /// Copies of a part of a layer's ids that the target's own code has asked for. They are not read.
    pub partial: u64,
    /// Ids that were seen again in the same pass, for another weight of the layer.
    pub repeated: u64,
}

/// Choices made from router logits.
#[derive(Debug, Serialize)]
pub struct Logits {
    /// Rows for which the choice was made.
    pub rows: u64,
    /// Rows for which it could not be made.
    pub refused: u64,
    /// Time in which the host computed logits, in milliseconds; the device had to wait for it.
    pub host_ms: f64,
}

/// A balance.
#[derive(Debug, Serialize)]
pub struct Flow {
    /// What was there.
    pub seen: u64,
    /// What was given to the ring buffer.
    pub emitted: u64,
    /// What was not, by reason.
    pub dropped: Dropped,
}

/// Losses by reason.
#[derive(Debug, Serialize)]
pub struct Dropped {
    /// The ring buffer was full.
    pub ring_full: u64,
    /// The target's memory could not be read.
    pub unreadable: u64,
}

/// Entries for expert ids of which not even the number of rows is known.
#[derive(Debug, Serialize)]
pub struct UnknownRows {
    /// The tensor made no sense.
    pub malformed: u64,
    /// The tensor could not be read.
    pub unreadable: u64,
}

impl Integrity {
    /// Draws up the balance. `entered` are the hits of the probes for expert ids.
    pub fn new(
        entered: u64,
        counters: &Counters,
        received: Received,
        from_logits: &FromLogits,
        ring_buffer_bytes: u32,
    ) -> Self {
        let get = |counter| counters.get(counter);
        let mut integrity = Self {
            complete: true,
            problems: Vec::new(),
            hits: Hits {
                entered,
                filtered_thread: get(Counter::FilteredThread),
                filtered_tensor: get(Counter::FilteredTensor),
                token_lookup: get(Counter::TokenLookup),
                unreadable: get(Counter::HitUnreadable),
                layout_unknown: get(Counter::LayoutUnknown),
                routed: get(Counter::Routed),
                passes: get(Counter::Passes),
                ubatch_unreadable: get(Counter::UbatchUnreadable),
                state_lost: get(Counter::StateLost),
            },
            routes: Routes {
                splits: get(Counter::CpuSplits),
                split_inputs: get(Counter::SplitIds),
                split_logits: get(Counter::SplitLogits),
                ids_copies: get(Counter::IdsCopies),
                fetches: get(Counter::FetchedIds),
                device_copies: get(Counter::DeviceIds),
                callback_copies: get(Counter::CallbackIds),
                copies_lost: get(Counter::IdsCopiesLost),
                partial: get(Counter::PartialIds),
                repeated: get(Counter::RepeatedIds),
            },
            logits: Logits {
                rows: from_logits.rows,
                refused: 0,
                host_ms: get(Counter::SplitLogitsNs) as f64 / 1e6,
            },
            events: Flow {
                seen: get(Counter::EventsSeen),
                emitted: get(Counter::EventsEmitted),
                dropped: Dropped {
                    ring_full: get(Counter::EventsRingFull),
                    unreadable: get(Counter::EventsUnreadable),
                },
            },
            rows: Flow {
                seen: get(Counter::RowsSeen),
                emitted: get(Counter::RowsEmitted),
                dropped: Dropped {
                    ring_full: get(Counter::RowsRingFull),
                    unreadable: get(Counter::RowsUnreadable),
                },
            },
            unknown_rows: UnknownRows {
                malformed: get(Counter::RoutedMalformed),
                unreadable: get(Counter::RoutedUnreadable),
            },
            received,
            ring_buffer_bytes,
        };
        integrity.problems = integrity.find_problems();
        integrity.complete = integrity.problems.is_empty();
        integrity
    }

    /// Adds the rows of logits that told no experts: the last passes are judged when all has arrived.
    pub fn with_refusals(mut self, from_logits: &FromLogits) -> Self {
        self.logits.refused = from_logits.refused.values().sum();
        let problems = from_logits.refused.iter().map(|(refusal, rows)| {
            format!(
                "{rows} rows of router logits tell no experts: {}",
                refusal.text()
            )
        });
        self.with_problems(problems.collect())
    }

    /// Adds problems that the counters do not show.
    pub fn with_problems(mut self, problems: Vec<String>) -> Self {
        self.problems.extend(problems);
        self.complete = self.problems.is_empty();
        self
    }

    /// Counts the copies that are still awaited as lost: nobody is left who could have them.
    pub fn without_target(mut self) -> Self {
        let Routes {
            ids_copies,
            fetches,
            device_copies,
            callback_copies,
            copies_lost,
            ..
        } = self.routes;
        let arrived = fetches + device_copies + callback_copies;
        let awaited = ids_copies.saturating_sub(arrived + copies_lost);
        if awaited > 0 {
            self.routes.copies_lost += awaited;
            self.problems.push(format!(
                "{awaited} copies of expert ids to the host were awaited when the target ended"
            ));
            self.complete = false;
        }
        self
    }

    /// What was lost, in units of which a layer's routing in a pass needs at least one: records, and what
    /// would have become one.
    pub fn lost(&self) -> u64 {
        let Dropped {
            ring_full,
            unreadable,
        } = self.events.dropped;
        let unknown = self.unknown_rows.malformed + self.unknown_rows.unreadable;
        let unreadable = unreadable + unknown + self.hits.unreadable;
        let mixed_up = self.received.rejected + self.routes.copies_lost + self.hits.state_lost;
        ring_full + unreadable + mixed_up
    }

    /// Whether the sums are right: they are not while a probe is running.
    pub fn adds_up(&self) -> bool {
        self.imbalances().is_empty()
    }

    fn find_problems(&self) -> Vec<String> {
        let mut problems = self.imbalances();
        let Hits {
            entered,
            filtered_thread,
            token_lookup,
            unreadable,
            layout_unknown,
            routed,
            ..
        } = self.hits;
        let mut loss = |count: u64, text: &str| {
            if count > 0 {
                problems.push(format!("{count} {text}"));
            }
        };
        loss(
            self.rows.dropped.ring_full,
            "rows lost: ring buffer full (use a larger --buffer-size)",
        );
        loss(
            self.events.dropped.ring_full,
            "records lost: ring buffer full (use a larger --buffer-size)",
        );
        loss(
            self.rows.dropped.unreadable,
            "rows lost: ids could not be read",
        );
        loss(
            self.events.dropped.unreadable,
            "records lost: memory could not be read",
        );
        if routed == 0 && filtered_thread == entered {
            loss(
                entered,
                "hits, none of them on the first thread of its pool: ggml_compute_params has a \
                 layout that is not known (it is older than b3209, or changed)",
            );
        }
        if routed == 0 && token_lookup == 0 {
            loss(
                layout_unknown,
                "hits in a ggml whose tensors have a layout that is not known: nothing was read \
                 (it is older than b3209, or changed)",
            );
        }
        loss(unreadable, "hits whose tensors could not be read");
        loss(
            self.unknown_rows.malformed,
            "ids tensors that make no sense",
        );
        loss(
            self.unknown_rows.unreadable,
            "ids tensors that could not be read",
        );
        loss(
            self.received.rejected,
            "records with impossible contents, not counted",
        );
        loss(
            self.received.differing_rows,
            "rows that were read in two ways, and differ",
        );
        loss(
            self.routes.copies_lost,
            "copies of expert ids to the host whose arrival was not seen",
        );
        loss(
            self.hits.state_lost,
            "times a kernel map was full: passes may be mixed up",
        );
        problems
    }

    fn imbalances(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut balance = |what: &str, left: u64, right: u64| {
            if left != right {
                problems.push(format!("{what} do not add up: {left} is not {right}"));
            }
        };
        let Hits {
            entered,
            filtered_thread,
            filtered_tensor,
            token_lookup,
            unreadable,
            layout_unknown,
            routed,
            ..
        } = self.hits;
        let hits =
            filtered_thread + filtered_tensor + token_lookup + unreadable + layout_unknown + routed;
        balance("hits", entered, hits);
        balance("events", self.events.seen, self.events.total());
        balance("rows", self.rows.seen, self.rows.total());
        balance("events received", self.events.emitted, self.received.events);
        if self.received.rejected == 0 {
            balance("rows received", self.rows.emitted, self.received.rows);
        }
        problems
    }
}

impl Flow {
    /// Whether what was seen is what was emitted and what was dropped.
    pub fn balances(&self) -> bool {
        self.seen == self.total()
    }

    fn total(&self) -> u64 {
        self.emitted + self.dropped.ring_full + self.dropped.unreadable
    }
}
