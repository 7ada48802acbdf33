use std::{
    fs::{self, File},
    io::Cursor,
    path::Path,
};

use expert_trace_common::Phase;

use super::{
    frames::{Frames, Next},
    reader::{ReadError, Reader},
    schema::{Capture, FORMAT_KEY, VERSION_KEY},
    writer::Writer,
    *,
};

fn row(number: u32, experts: &[u16]) -> Row<'_> {
    Row {
        context: Some(0),
        pass: Some(number),
        phase: Some(Phase::Decode),
        layer: Some(3),
        row: Some(0),
        sequence: Some(1),
        position: Some(number as i32),
        token: Some(-1),
        time_ns: i64::from(number),
        experts,
        ..Row::of(Kind::Routed)
    }
}

fn context() -> Row<'static> {
    Row {
        context: Some(0),
        detail: Some("{}"),
        ..Row::of(Kind::Context)
    }
}

fn gap() -> Row<'static> {
    Row {
        context: Some(0),
        pass: Some(9),
        layer: None,
        rows: None,
        reason: Some(Reason::PassNotSeen),
        ..Row::of(Kind::Gap)
    }
}

/// A trace of these batches, as bytes.
fn written(batches: &[&[Row<'_>]]) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut writer = Writer::begin(file.reopen().unwrap(), &Capture::default()).unwrap();
    for batch in batches {
        for row in *batch {
            writer.push(row);
        }
        writer.flush();
    }
    let bytes = writer.finish().unwrap();
    let content = fs::read(file.path()).unwrap();
    assert_eq!(content.len() as u64, bytes);
    content
}

fn open(bytes: &[u8]) -> Result<Reader<Cursor<&[u8]>>, ReadError> {
    Reader::new(Cursor::new(bytes), Path::new("trace"))
}

/// Rows that can be read, and how the trace ends.
fn read(bytes: &[u8]) -> Option<(Vec<String>, Ending)> {
    let mut reader = open(bytes).ok()?;
    let mut rows = Vec::new();
    while let Some(batch) = reader.next().unwrap() {
        rows.extend(batch.rows().map(|row| format!("{row:?}")));
    }
    Some((rows, reader.ending().unwrap().clone()))
}

#[test]
fn rows_come_back_as_they_were() {
    let wide: Vec<u16> = (0..1024).rev().collect();
    let rows = [
        context(),
        row(0, &[7, 3]),
        gap(),
        row(1, &wide),
        row(2, &[]),
    ];
    let bytes = written(&[&rows[..3], &rows[3..]]);
    let (found, ending) = read(&bytes).unwrap();
    let expected: Vec<String> = rows.iter().map(|row| format!("{row:?}")).collect();
    assert_eq!(found, expected);
    assert_eq!(ending, Ending::Whole);
}

#[test]
fn every_kind_and_reason_has_its_name() {
    let mut rows: Vec<Row<'_>> = Kind::ALL.map(Row::of).into();
    rows.extend(Reason::ALL.map(|reason| Row {
        reason: Some(reason),
        ..Row::of(Kind::Gap)
    }));
    rows.push(Row {
        phase: Some(Phase::Prefill),
        ..Row::of(Kind::Routed)
    });
    let (found, _) = read(&written(&[&rows])).unwrap();
    let expected: Vec<String> = rows.iter().map(|row| format!("{row:?}")).collect();
    assert_eq!(found, expected);
    for (number, kind) in (0..).zip(Kind::ALL) {
        assert_eq!(kind as u8, number);
    }
    for (number, reason) in (0..).zip(Reason::ALL) {
        assert_eq!(reason as u8, number);
    }
}

#[test]
fn what_stands_before_a_cut_is_read() {
    let rows: Vec<Row<'_>> = (0..4).map(|number| row(number, &[1, 2])).collect();
    let bytes = written(&[&rows[..1], &rows[1..3], &rows[3..]]);
    let mut frames = Frames::new(bytes.as_slice());
    let mut ends = Vec::new();
    while let Next::Frame(_) = frames.read().unwrap() {
        ends.push(frames.position() as usize);
    }
    // The schema, three dictionaries, and the batches.
    let batches = &ends[ends.len() - 3..];
    for length in 0..bytes.len() {
        let whole = batches.iter().filter(|end| **end <= length).count();
        let rows = [0, 1, 3, 4][whole];
        match read(&bytes[..length]) {
            None => assert!(length < ends[0], "{length} of {}", bytes.len()),
            Some((found, ending)) => {
                assert_eq!((found.len(), ending), (rows, Ending::Cut), "{length}");
            }
        }
    }
}

/// No byte that is changed makes us panic, or reserve memory that is not there.
#[test]
fn damaged_traces_are_read_up_to_the_damage() {
    let rows = [context(), row(0, &[1, 2]), gap(), row(1, &[3])];
    let bytes = written(&[&rows[..2], &rows[2..]]);
    let mut damaged = 0;
    for place in 0..bytes.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[place] ^= change;
            if let Some((found, ending)) = read(&changed) {
                assert!(found.len() <= rows.len());
                damaged += usize::from(matches!(ending, Ending::Damaged(_)));
            }
        }
    }
    assert!(damaged > 0);
    // A column that promises more than there can be.
    let mut huge = written(&[&[row(0, &(0..1024).collect::<Vec<u16>>())]]);
    let prefix = 2048_i64.to_le_bytes();
    let at = huge.windows(8).rposition(|bytes| bytes == prefix).unwrap();
    huge[at..at + 8].copy_from_slice(&(1_i64 << 60).to_le_bytes());
    let Some((_, Ending::Damaged(why))) = read(&huge) else {
        panic!("it was believed");
    };
    assert!(
        why.contains("a column of 1152921504606846976 bytes"),
        "{why}"
    );
}

#[test]
fn other_files_are_named() {
    let text = |bytes: &[u8]| match open(bytes) {
        Ok(_) => panic!("it was read"),
        Err(error) => error.to_string(),
    };
    assert!(text(b"").contains("it is empty"));
    assert!(text(b"layer,expert\n0,3\n").contains("does not begin as an Arrow IPC stream"));
    assert!(text(b"{\"schema\":{}}").contains("does not begin as an Arrow IPC stream"));

    let of = |metadata: [(&str, &str); 2], fields| {
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let schema = arrow_schema::Schema::new_with_metadata(
            fields,
            std::collections::HashMap::from(metadata),
        );
        let mut bytes = Vec::new();
        arrow_ipc::writer::StreamWriter::try_new(&mut bytes, &schema).unwrap();
        bytes
    };
    let fields = schema::fields;
    let ours = (FORMAT_KEY, schema::FORMAT);
    let foreign = of([("a", "b"), ("c", "d")], fields());
    assert!(text(&foreign).contains("does not have expert-trace.format"));
    let newer = of([ours, (VERSION_KEY, "2")], fields());
    assert!(
        text(&newer).contains("use a newer expert-trace"),
        "{}",
        text(&newer)
    );
    let odd = of([ours, (VERSION_KEY, "x")], fields());
    assert!(text(&odd).contains("its version is 'x'"));
    let lacking = of([ours, (VERSION_KEY, "1")], fields().split_off(1));
    assert!(text(&lacking).contains("no column record"));
    let mut other = fields();
    other[4] = arrow_schema::Field::new("layer", arrow_schema::DataType::Utf8, true);
    let typed = of([ours, (VERSION_KEY, "1")], other);
    assert!(
        text(&typed).contains("its column layer has the type Utf8"),
        "{}",
        text(&typed)
    );
}

#[test]
fn a_full_batch_is_written_at_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut writer = Writer::begin(file.reopen().unwrap(), &Capture::default()).unwrap();
    for number in 0..columns::BATCH_ROWS as u32 {
        assert!(number == 0 || writer.due().is_some());
        writer.push(&row(number, &[1]));
    }
    assert_eq!(writer.due(), None);
    writer.finish().unwrap();
    let mut reader = Reader::open(file.path()).unwrap();
    assert_eq!(reader.next().unwrap().unwrap().len(), columns::BATCH_ROWS);
    assert!(reader.next().unwrap().is_none());
}

#[test]
fn a_disk_that_is_full_is_an_error() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut writer = Writer::begin(full, &Capture::default()).unwrap();
    writer.push(&row(0, &[1]));
    assert!(writer.finish().is_err());
}
