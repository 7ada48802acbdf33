//! Hooks C, D and E: expert ids on their way from a device to the host.
//!
//! Nothing is read when a copy is asked for: it is read when the thread does what it can only do with
//! the ids at hand. The target's own code can do anything with them; there they are read when the
//! function that copies returns.
//!
//! | who wants the ids | asks for them by | has them when it enters |
//! |---|---|---|
//! | the scheduler, to stream the chosen experts' weights (`ggml_backend_sched_compute_splits`) | `get_tensor_async(backend, tensor, data, …)` | `set_tensor_async`, for the first weight |
//! | the target's own code, in an eval callback | `ggml_backend_tensor_get(tensor, data, …)` | … returns from it |
//! | CUDA's MUL_MAT_ID, to sort tokens by expert (`ggml_cuda_mul_mat_id`) | `cudaMemcpyAsync(host, ids->data, …)` | the next `cudaMemcpyAsync`, of the sorted rows |

use aya_ebpf::{EbpfContext, macros::map, maps::LruHashMap};
use expert_trace_common::{Counter, Kind, Route, TENSOR_LAYOUTS};

use crate::{
    maps::{THREADS, count, is_read},
    rows::{Routed, emit_routed, is_first_sight},
    target::{Address, process_and_thread},
    tensor::{DataAndName, Name, Shape, TYPE_I32, copied_layer, ids_layer, layer_behind, source},
};

/// `cudaMemcpyKind` (driver_types.h).
const HOST_TO_DEVICE: u64 = 1;
const DEVICE_TO_HOST: u64 = 2;
/// `cudaStreamPerThread` (driver_api_types.h), on which the backend copies when somebody asks it for a
/// tensor. What it copies for itself goes through the streams it has made, which are pointers.
const STREAM_PER_THREAD: u64 = 2;

const FETCH: u16 = Route::Fetch as u16;
const CALLBACK: u16 = Route::Callback as u16;
const DEVICE_COPY: u16 = Route::DeviceCopy as u16;

/// By thread: the ids it waits for.
#[map]
static AWAITED: LruHashMap<u64, Awaited> = LruHashMap::with_max_entries(4096, 0);

#[repr(C)]
#[derive(Clone, Copy)]
struct Awaited {
    tensor: u64,
    /// Where they are on the device, until the copy has been asked for.
    device: u64,
    /// Where they will be on the host; 0 until the copy has been asked for.
    host: u64,
    /// Bytes that the device copies for itself. Where ids were, other data can lie soon after.
    bytes: u64,
    /// On which it does.
    stream: u64,
    layer: u16,
    /// A [`Route`].
    route: u16,
    /// 1 when they are there as soon as the function returns which the thread is in.
    within_call: u32,
}

/// `get_tensor_async(backend, tensor, data, offset, size)` is entered.
#[inline(always)]
pub fn on_fetch(tensor: Address, data: u64, offset: u64) {
    let Some(read) = DataAndName::read(tensor, &TENSOR_LAYOUTS[0]) else {
        return;
    };
    let own = ids_layer(&read.name).map(|layer| (tensor, layer));
    let Some((tensor, layer)) = own.or_else(|| ids_in_a_row(tensor, &read.name)) else {
        return;
    };
    // The scheduler takes all of it at once.
    if offset != 0 {
        return;
    }
    await_ids(Awaited {
        tensor: tensor.0,
        device: read.data,
        host: data,
        bytes: 0,
        stream: 0,
        layer,
        route: FETCH,
        within_call: 0,
    });
}

/// Ids that a cache of experts asks for (`llama_moe_cache::copy`, llama-moe-cache.cpp in b11549): all of
/// a pass in a row, for which there is another tensor, whose name goes on (`ffn_moe_topk-N (reshaped)`).
/// What multiplies the experts then has slots of the cache for its ids, by another name.
#[inline(always)]
fn ids_in_a_row(tensor: Address, name: &Name) -> Option<(Address, u16)> {
    let layer = layer_behind(name, b"ffn_moe_topk-", b' ')?;
    let ids = source(tensor, &TENSOR_LAYOUTS[0], 0)?;
    let (row, rows) = (tensor.read::<Shape>()?, ids.read::<Shape>()?);
    let [k, n, ..] = rows.ne;
    (row.kind == TYPE_I32 && row.ne[0] == k * n && row.ne[1] == 1).then_some((ids, layer))
}

/// `set_tensor_async` is entered.
#[inline(always)]
pub fn on_weights_follow<C: EbpfContext>(ctx: &C, source: u32) {
    if let Some(awaited) = awaited()
        && awaited.route == FETCH
    {
        arrived(ctx, source, &awaited);
    }
}

/// `ggml_backend_tensor_get(tensor, data, offset, bytes)` is entered: by the target's own code, by the
/// scheduler, whose copies other hooks see, or for a `get_tensor_async` of a device that has none.
#[inline(always)]
pub fn on_tensor_get(tensor: Address, data: u64, offset: u64, bytes: u64) {
    let Some(state) = THREADS.get_ptr_mut(process_and_thread()) else {
        return;
    };
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    let state = unsafe { &*state };
    if state.context == 0 || state.no_callback != 0 {
        return;
    }
    let Some((device, layer)) = asked_for(tensor) else {
        return;
    };
    let Some(shape) = tensor.read::<Shape>() else {
        return count(Counter::RoutedUnreadable, 1);
    };
    if offset != 0 || bytes < shape.bytes() {
        return count(Counter::PartialIds, 1);
    }
    let next = Awaited {
        tensor: tensor.0,
        device,
        host: data,
        bytes: 0,
        stream: 0,
        layer,
        route: CALLBACK,
        within_call: 1,
    };
    match awaited() {
        Some(last) if is_same_copy(&last, &next) => await_ids(Awaited {
            within_call: 1,
            ..last
        }),
        _ => await_ids(next),
    }
}

/// `ggml_backend_tensor_get` returns.
#[inline(always)]
pub fn on_tensor_get_done<C: EbpfContext>(ctx: &C, source: u32) {
    if let Some(awaited) = awaited()
        && awaited.within_call != 0
    {
        arrived(ctx, source, &awaited);
    }
}

/// Where a tensor of expert ids, or a copy of one on any device, has its data; and its layer.
#[inline(always)]
fn asked_for(tensor: Address) -> Option<(u64, u16)> {
    let of = |layout| {
        let read = DataAndName::read(tensor, layout)?;
        let layer = ids_layer(&read.name).or_else(|| copied_layer(tensor, layout))?;
        Some((read.data, layer))
    };
    of(&TENSOR_LAYOUTS[0]).or_else(|| of(&TENSOR_LAYOUTS[1]))
}

/// `ggml_cuda_mul_mat_id(context, dst)` is entered. It may go on without a copy.
#[inline(always)]
pub fn on_device_mul_mat_id(dst: Address) {
    let Some((tensor, read, layer)) = ids_of(dst) else {
        return;
    };
    let Some(shape) = tensor.read::<Shape>() else {
        return;
    };
    let awaited = Awaited {
        tensor: tensor.0,
        device: read.data,
        host: 0,
        bytes: shape.bytes(),
        stream: 0,
        layer,
        route: DEVICE_COPY,
        within_call: 0,
    };
    remember(&awaited);
}

/// A `cudaMemcpyAsync(dst, src, count, kind, stream)`.
#[derive(Clone, Copy)]
pub struct Memcpy {
    pub to: u64,
    pub from: u64,
    pub bytes: u64,
    pub kind: u64,
    pub stream: u64,
}

/// `cudaMemcpyAsync` is entered.
#[inline(always)]
pub fn on_device_memcpy<C: EbpfContext>(ctx: &C, source: u32, copy: Memcpy) {
    if copy.stream <= STREAM_PER_THREAD {
        return;
    }
    let Some(awaited) = awaited() else {
        return;
    };
    if awaited.route != DEVICE_COPY {
        return;
    }
    let kind = copy.kind & 0xffff_ffff;
    if awaited.host == 0 {
        if kind == DEVICE_TO_HOST && copy.from == awaited.device && copy.bytes == awaited.bytes {
            await_ids(Awaited {
                host: copy.to,
                stream: copy.stream,
                ..awaited
            });
        }
    } else if kind == HOST_TO_DEVICE && copy.stream == awaited.stream {
        arrived(ctx, source, &awaited);
    }
}

/// A pass begins: what has not arrived in the last one does not any more.
#[inline(always)]
pub fn on_pass_begin() {
    if let Some(awaited) = awaited() {
        if awaited.host != 0 {
            count(Counter::IdsCopiesLost, 1);
        }
        forget();
    }
}

/// `src[2]` of a MUL_MAT_ID, if it is a tensor of expert ids.
#[inline(always)]
fn ids_of(dst: Address) -> Option<(Address, DataAndName, u16)> {
    let layout = &TENSOR_LAYOUTS[0];
    if let Some(ids) = source(dst, layout, 2)
        && let Some(read) = DataAndName::read(ids, layout)
        && let Some(layer) = ids_layer(&read.name)
    {
        return Some((ids, read, layer));
    }
    let layout = &TENSOR_LAYOUTS[1];
    let ids = source(dst, layout, 2)?;
    let read = DataAndName::read(ids, layout)?;
    let layer = ids_layer(&read.name)?;
    Some((ids, read, layer))
}

#[inline(always)]
fn awaited() -> Option<Awaited> {
    let awaited = AWAITED.get_ptr(process_and_thread())?;
    // SAFETY: the map's value is alive during the program, and belongs to this thread.
    Some(unsafe { *awaited })
}

#[inline(always)]
fn forget() {
    // It fails only when there is no such entry.
    let _ = AWAITED.remove(process_and_thread());
}

#[inline(always)]
fn remember(next: &Awaited) {
    if let Some(last) = awaited()
        && last.host != 0
        && !is_same_copy(&last, next)
    {
        count(Counter::IdsCopiesLost, 1);
    }
    if AWAITED.insert(process_and_thread(), next, 0).is_err() {
        count(Counter::StateLost, 1);
    }
}

#[inline(always)]
fn await_ids(next: Awaited) {
    if awaited().is_none_or(|last| !is_same_copy(&last, &next)) {
        count(Counter::IdsCopies, 1);
    }
    remember(&next);
}

/// An interface and what stands behind it are asked one after the other.
#[inline(always)]
fn is_same_copy(last: &Awaited, next: &Awaited) -> bool {
    last.host == next.host && last.tensor == next.tensor
}

#[inline(always)]
fn arrived<C: EbpfContext>(ctx: &C, source: u32, awaited: &Awaited) {
    forget();
    let (route, counter) = match awaited.route {
        FETCH => (Route::Fetch, Counter::FetchedIds),
        CALLBACK => (Route::Callback, Counter::CallbackIds),
        _ => (Route::DeviceCopy, Counter::DeviceIds),
    };
    count(counter, 1);
    let tensor = Address(awaited.tensor);
    if !is_read(route) || !is_first_sight(tensor) {
        return;
    }
    emit_routed(
        ctx,
        &Routed {
            kind: Kind::Rows,
            route,
            layer: awaited.layer,
            source,
            tensor,
            data: Address(awaited.host),
            weights: None,
        },
    );
}
