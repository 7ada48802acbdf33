//! Bytes of the ring buffer to events.
//!
//! Total: whatever the bytes, there is an event or a reason, never a panic. The bytes come from our
//! own BPF programs, but the ids in them, the tensor's shape and the ubatch are the target's.

use std::{mem::size_of, ptr};

use expert_trace_common::{Header, Kind, MAX_EXPERTS, MAX_LAYERS, Route, RowInfo};
use thiserror::Error;

use crate::selection::Stage;

/// What has happened in the target.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// Context, pass, layer and so on.
    pub header: Header,
    /// The rest, by kind.
    pub body: Body<'a>,
}

/// What an event brings beside its header.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// `header.rows` × `header.k` choices.
    Rows(Choices<'a>),
    /// The same, of the second block of experts that the layer has.
    SecondBlock(Choices<'a>),
    /// `header.rows` × `header.k` values to choose experts by, one per expert.
    Scores(Scores<'a>),
    /// Rows of a pass' ubatch; a pass begins where `header.first_row` is 0.
    Pass(RowInfos<'a>),
    /// Token ids of a pass.
    Tokens(Numbers<'a>),
    /// The context is being freed.
    ContextEnd,
    /// The context uses the scheduler at this address.
    Owner(u64),
    /// The process computes graphs with an eval callback of its own, which is at this address.
    EvalCallback(u64),
    /// The target's list of loaded libraries has changed.
    Libraries,
    /// A process that is followed has been forked.
    ProcessStart,
    /// A process has ended, with this status as waitpid tells it.
    ProcessEnd(u32),
}

/// Why bytes are no event.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than a header, or than what the header promises.
    #[error("record is too short")]
    Short,
    /// A number that no [`Kind`] has.
    #[error("unknown kind of record {0}")]
    Kind(u8),
    /// k, a layer or row numbers out of their range.
    #[error("impossible shape")]
    Shape,
    /// An expert that the model cannot have.
    #[error("expert id {0} is out of range")]
    ExpertId(i32),
}

/// 32-bit integers of a payload.
#[derive(Clone, Copy, Debug)]
pub struct Numbers<'a>(&'a [u8]);

impl<'a> Numbers<'a> {
    /// The integers, in order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = i32> + 'a {
        self.0
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i32::from_ne_bytes(*bytes))
    }
}

/// Experts that were chosen, row by row, in router order within a row.
#[derive(Clone, Copy, Debug)]
pub struct Choices<'a> {
    /// Which.
    pub ids: Numbers<'a>,
    /// The router's weight of each, before it is normalised or scaled, where it was asked for and could be
    /// read.
    pub weights: Option<Floats<'a>>,
}

/// What experts are chosen by.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// What they are.
    pub stage: Stage,
    /// One for each expert, row by row.
    pub values: Floats<'a>,
}

/// 32-bit floating-point numbers of a payload.
#[derive(Clone, Copy, Debug)]
pub struct Floats<'a>(&'a [u8]);

impl<'a> Floats<'a> {
    /// The numbers, in order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = f32> + 'a {
        self.0
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_ne_bytes(*bytes))
    }
}

/// [`RowInfo`]s of a payload.
#[derive(Clone, Copy, Debug)]
pub struct RowInfos<'a>(&'a [u8]);

impl<'a> RowInfos<'a> {
    /// The rows, in order.
    pub fn iter(self) -> impl ExactSizeIterator<Item = RowInfo> + 'a {
        self.0
            .as_chunks::<{ size_of::<RowInfo>() }>()
            .0
            .iter()
            // SAFETY: the source has the size of the type, which is valid for every pattern of bits.
            .map(|bytes| unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) })
    }
}

/// Decodes one record.
///
/// # Errors
/// Says why the bytes cannot be believed; none of them is to be counted then.
pub fn decode(bytes: &[u8]) -> Result<Event<'_>, Malformed> {
    let (head, payload) = bytes
        .split_at_checked(size_of::<Header>())
        .ok_or(Malformed::Short)?;
    // SAFETY: the source has the size of the type, which is valid for every pattern of bits.
    let header: Header = unsafe { ptr::read_unaligned(head.as_ptr().cast()) };
    let kind = Kind::from_u8(header.kind).ok_or(Malformed::Kind(header.kind))?;
    let last_row = header.first_row.checked_add(header.rows);
    if last_row.is_none_or(|last| last > header.total_rows) {
        return Err(Malformed::Shape);
    }
    let body = match kind {
        Kind::Rows => Body::Rows(ids(&header, payload)?),
        Kind::SecondBlock => Body::SecondBlock(ids(&header, payload)?),
        Kind::WeightedRows => Body::Rows(weighted(&header, payload)?),
        Kind::WeightedSecondBlock => Body::SecondBlock(weighted(&header, payload)?),
        Kind::Logits => scores(Stage::Logits, &header, payload)?,
        Kind::BiasedLogits => scores(Stage::BiasedLogits, &header, payload)?,
        Kind::Probs => scores(Stage::Probs, &header, payload)?,
        Kind::Selection => scores(Stage::Selection, &header, payload)?,
        Kind::Pass => Body::Pass(RowInfos(of_rows::<RowInfo>(&header, 1, payload)?)),
        Kind::Tokens => Body::Tokens(Numbers(of_rows::<i32>(&header, 1, payload)?)),
        Kind::ContextEnd => Body::ContextEnd,
        Kind::Libraries => Body::Libraries,
        Kind::ProcessStart => Body::ProcessStart,
        Kind::ProcessEnd => {
            let status = payload.first_chunk().ok_or(Malformed::Short)?;
            Body::ProcessEnd(u32::from_ne_bytes(*status))
        }
        Kind::Owner => Body::Owner(address(payload)?),
        Kind::EvalCallback => Body::EvalCallback(address(payload)?),
    };
    Ok(Event { header, body })
}

/// The bytes of the payload that are used: `per_row` elements for each row.
#[inline]
fn of_rows<'a, T>(header: &Header, per_row: u16, payload: &'a [u8]) -> Result<&'a [u8], Malformed> {
    let count = u64::from(header.rows) * u64::from(per_row);
    usize::try_from(count)
        .ok()
        .and_then(|count| count.checked_mul(size_of::<T>()))
        .and_then(|length| payload.get(..length))
        .ok_or(Malformed::Short)
}

/// k elements for each row of a layer.
#[inline]
fn routed<'a>(header: &Header, payload: &'a [u8]) -> Result<&'a [u8], Malformed> {
    let sane = (1..=MAX_EXPERTS).contains(&usize::from(header.k))
        && header.layer < MAX_LAYERS
        && usize::from(header.route) < Route::ALL.len();
    if sane {
        of_rows::<i32>(header, header.k, payload)
    } else {
        Err(Malformed::Shape)
    }
}

fn scores<'a>(stage: Stage, header: &Header, payload: &'a [u8]) -> Result<Body<'a>, Malformed> {
    let values = Floats(routed(header, payload)?);
    Ok(Body::Scores(Scores { stage, values }))
}

#[inline]
fn ids<'a>(header: &Header, payload: &'a [u8]) -> Result<Choices<'a>, Malformed> {
    let ids = Numbers(routed(header, payload)?);
    let bound = expert_bound(header);
    // The sign of this is set when any is negative or beyond. There is no branch in it, so that many ids
    // are looked at at once.
    let signs = ids
        .iter()
        .fold(0, |signs, id| signs | id | (bound - 1).wrapping_sub(id));
    if signs >= 0 {
        return Ok(Choices { ids, weights: None });
    }
    match ids.iter().find(|id| !(0..bound).contains(id)) {
        Some(id) => Err(Malformed::ExpertId(id)),
        None => Ok(Choices { ids, weights: None }),
    }
}

/// The same with the weights that follow all ids of the record.
fn weighted<'a>(header: &Header, payload: &'a [u8]) -> Result<Choices<'a>, Malformed> {
    let choices = ids(header, payload)?;
    let length = choices.ids.0.len();
    let weights = payload.get(length..2 * length).ok_or(Malformed::Short)?;
    Ok(Choices {
        weights: Some(Floats(weights)),
        ..choices
    })
}

fn address(payload: &[u8]) -> Result<u64, Malformed> {
    let bytes = payload.first_chunk().ok_or(Malformed::Short)?;
    Ok(u64::from_ne_bytes(*bytes))
}

/// Ids must be below this.
///
/// The ids tensor is a view of the argsort over all experts, so the distance of its rows is their
/// number; where rows lie close together (all experts chosen, or another way to choose) it is not,
/// and only llama.cpp's own limit is certain.
fn expert_bound(header: &Header) -> i32 {
    let stride = header.row_stride as usize;
    if stride > usize::from(header.k) {
        stride.min(MAX_EXPERTS) as i32
    } else {
        MAX_EXPERTS as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expert_trace_common::payload;

    fn bytes(header: Header, payload: &[u8]) -> Vec<u8> {
        // SAFETY: the header is made of integers without padding (checked in the common crate).
        let head = unsafe {
            std::slice::from_raw_parts((&raw const header).cast::<u8>(), size_of::<Header>())
        };
        [head, payload].concat()
    }

    fn ids(ids: &[i32]) -> Vec<u8> {
        ids.iter().flat_map(|id| id.to_ne_bytes()).collect()
    }

    fn rows(rows: u32, k: u16, row_stride: u32) -> Header {
        Header {
            kind: Kind::Rows as u8,
            k,
            rows,
            total_rows: rows,
            row_stride,
            ..Header::default()
        }
    }

    #[test]
    fn rows_come_back_as_they_were() {
        let mut payload = ids(&[3, 1, 31, 0]);
        payload.resize(payload::SMALL, 0xff);
        let record = bytes(rows(2, 2, 32), &payload);
        let Body::Rows(Choices { ids, weights }) = decode(&record).unwrap().body else {
            panic!()
        };
        assert_eq!(ids.iter().collect::<Vec<_>>(), [3, 1, 31, 0]);
        assert!(weights.is_none());
    }

    #[test]
    fn weights_follow_all_ids() {
        let weights = [0.5_f32, -1.0, f32::MIN_POSITIVE, 3.0];
        let mut payload = ids(&[3, 1, 31, 0]);
        payload.extend(weights.iter().flat_map(|weight| weight.to_ne_bytes()));
        let header = Header {
            kind: Kind::WeightedRows as u8,
            ..rows(2, 2, 32)
        };
        let record = bytes(header, &payload);
        let Body::Rows(choices) = decode(&record).unwrap().body else {
            panic!()
        };
        assert_eq!(choices.ids.iter().collect::<Vec<_>>(), [3, 1, 31, 0]);
        let found: Vec<f32> = choices.weights.unwrap().iter().collect();
        assert_eq!(found, weights);
        let cut = &record[..record.len() - 1];
        assert_eq!(decode(cut).unwrap_err(), Malformed::Short);
    }

    #[test]
    fn ids_the_model_cannot_have_are_refused() {
        for id in [32, -1, i32::MAX] {
            let record = bytes(rows(1, 2, 32), &ids(&[0, id]));
            assert_eq!(decode(&record).unwrap_err(), Malformed::ExpertId(id));
        }
        // All experts of the row chosen: the stride says nothing.
        assert!(decode(&bytes(rows(1, 2, 2), &ids(&[0, 1023]))).is_ok());
        assert!(decode(&bytes(rows(1, 2, 2), &ids(&[0, 1024]))).is_err());
    }

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        assert_eq!(
            decode(&bytes(rows(1, 0, 8), &[])).unwrap_err(),
            Malformed::Shape
        );
        assert_eq!(
            decode(&bytes(rows(1, 1025, 8), &[])).unwrap_err(),
            Malformed::Shape
        );
        assert_eq!(
            decode(&bytes(rows(9, 8, 8), &[0; 64])).unwrap_err(),
            Malformed::Short
        );
        let beyond = Header {
            first_row: u32::MAX,
            ..rows(1, 1, 8)
        };
        assert_eq!(
            decode(&bytes(beyond, &[0; 64])).unwrap_err(),
            Malformed::Shape
        );
    }

    #[test]
    fn any_bytes_give_an_answer() {
        // Every kind, with lengths and header bytes that change one at a time.
        for kind in 0..=17 {
            let record = bytes(
                Header {
                    kind,
                    ..rows(2, 2, 32)
                },
                &ids(&[3, 1, 31, 0]),
            );
            for length in 0..record.len() {
                let _ = decode(&record[..length]);
            }
            for i in 0..record.len() {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut changed = record.clone();
                    changed[i] = value;
                    let _ = decode(&changed);
                }
            }
        }
    }
}
