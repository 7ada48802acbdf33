//! What is lost is counted to the row.

use expert_trace_tests::{
    oracle::Oracle,
    tracer::{Attached, Stats, count},
};
use nix::sys::signal::Signal;

use crate::support::{driver, ids, known_small, scratch};

/// The smallest ring buffer, with the reader stopped: what fits is known by arithmetic.
#[test]
fn a_full_ring_buffer_loses_a_known_number_of_rows() {
    const PASSES: u64 = 100;
    // Header and small payload of a record, and the kernel's own 8 bytes before it
    // (BPF_RINGBUF_HDR_SZ); one byte of the buffer stays free (__bpf_ringbuf_reserve).
    const FIT: u64 = 4095 / (64 + 64 + 8);
    // The first eight passes of a context also bring their tokens, to recognise a warm-up.
    const WARMUP_PASSES: u64 = 8;

    let known = known_small();
    let layers = u64::from(known.expected.layers());
    let directory = scratch();
    let path = directory.path().join("stats.json");
    let mut target = Oracle::spawn(&mut driver(&known.path, &["-t", "1"])).unwrap();
    let options = ["-o", path.to_str().unwrap(), "--buffer-size", "4K"];
    let tracer = Attached::to(target.pid(), &options).unwrap();
    tracer.signal(Signal::SIGSTOP).unwrap();
    let generated = ids(&target.command(&format!("generate 0 {PASSES} 21")).unwrap());
    tracer.signal(Signal::SIGCONT).unwrap();
    let said = tracer.interrupt().unwrap();
    assert!(target.quit().unwrap().success());

    // Each pass is a record of its own, its tokens, and one record per layer. What fits is the start of
    // it all.
    let per_pass = 2 + layers;
    let passes_seen = FIT / per_pass;
    let of_cut_pass = FIT % per_pass;
    assert!(passes_seen < WARMUP_PASSES);
    let rows_seen = passes_seen * layers + of_cut_pass.saturating_sub(2);

    let stats = Stats::read(&path).unwrap();
    let number = |pointer: &str| stats.number(&format!("/integrity{pointer}"));
    assert_eq!(number("/rows/seen"), PASSES * layers);
    assert_eq!(number("/rows/emitted"), rows_seen);
    let lost = PASSES * layers - rows_seen;
    assert_eq!(number("/rows/dropped/ring_full"), lost);
    let events = PASSES * (1 + layers) + WARMUP_PASSES;
    assert_eq!(number("/events/seen"), events);
    assert_eq!(number("/events/emitted"), FIT);
    assert_eq!(number("/events/dropped/ring_full"), events - FIT);
    assert_eq!(number("/received/events"), FIT);
    assert_eq!(number("/received/rows"), rows_seen);
    assert_eq!(stats.0["integrity"]["complete"], false);
    assert!(
        said.contains(&format!("INCOMPLETE: {lost} rows lost: ring buffer full")),
        "{said}"
    );

    // And what was not lost is right; the pass that was cut is left out.
    assert_eq!(stats.excluded("partial").0, u64::from(of_cut_pass > 2));
    let decoded: Vec<u32> = [&[21], &generated[..]].concat();
    let rows = (0..known.expected.layers()).flat_map(|layer| {
        decoded[..passes_seen as usize]
            .iter()
            .map(move |token| (layer, known.expected.ids(layer, *token)))
    });
    assert_eq!(stats.counts(), count(rows));
}
