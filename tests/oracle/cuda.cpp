// Stands in for llama.cpp on an NVIDIA GPU where there is none: the calls by which expert ids come to
// the host, in ggml's order and by ggml's names, on a device that cudart.c stands in for.
//
// Usage: cuda LAYOUT K ROWS N_EXPERT STEP...
//
//   LAYOUT   new (tensors of b4106 and newer), old (b3209 to b4105)
//
//   pass     the scheduler begins a pass, and tokens are looked up on the CPU
//   slow     next layer: three MUL_MAT_IDs, each of which sorts tokens by expert on the host
//   gate, rest   the same in two steps: the first MUL_MAT_ID, and the two others
//   fast     next layer: three MUL_MAT_IDs without the host
//   fetch    next layer: the scheduler streams the chosen experts' weights, and then as slow
//   cache    next layer: a cache of experts looks up the slots that the ids have, and streams what it
//            lacks; then as slow, by slots
//   other    as slow, with ids of another name, which are no layer's
//   get      somebody gets the last ids by ggml_backend_tensor_get, and sets something
//   reuse    as fast; then the scheduler fetches other data, which lies where the ids were, and sets
//            something
//   broken   next layer: MUL_MAT_IDs that end after they have asked for the ids
//   thread   a second thread does broken as its last thing, in a pass of its own
//   again    next layer: the scheduler fetches ids, and goes on without weights
//   wait     prints a line, and reads one from stdin
//
// Prints each row whose ids the host had for a layer, once: its layer, and its ids in order.

#include "cudart.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A function of its own, with its own name, whatever the compiler thinks of it.
#define KEPT __attribute__((noipa))

#ifdef API_INLINED
#    define API static inline __attribute__((always_inline))
#else
#    define API extern "C" KEPT
#endif

struct ggml_tensor {
    char bytes[352];
};

struct ggml_backend_cuda_context {
    void * stream;
    void * scratch;
    bool   fast, broken;
    int    shown;
};

struct ggml_backend {
    void (*set_tensor_async)(ggml_backend *, ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor_async)(ggml_backend *, const ggml_tensor *, void *, size_t, size_t);
    ggml_backend_cuda_context * context;
};

static struct {
    size_t src, data, name;
} at = { 152, 248, 256 };

static int64_t k, rows, n_expert;

template <typename T> static T & field(const ggml_tensor * tensor, size_t offset) {
    return *(T *) (tensor->bytes + offset);
}

static void *& data_of(const ggml_tensor * tensor) {
    return field<void *>(tensor, at.data);
}

static ggml_tensor *& src_of(const ggml_tensor * tensor, int index) {
    return field<ggml_tensor *>(tensor, at.src + 8 * index);
}

// ggml_nbytes: the last row of a view ends with its last element.
static size_t bytes_of(const ggml_tensor * tensor) {
    const int64_t * ne = &field<int64_t>(tensor, 16);
    const size_t *  nb = &field<size_t>(tensor, 48);
    return 4 + (ne[0] - 1) * nb[0] + (ne[1] - 1) * nb[1];
}

static void describe(ggml_tensor * tensor, int64_t columns, size_t row_stride, void * data, const char * name) {
    const int64_t ne[4] = { columns, rows, 1, 1 };
    const size_t  nb[4] = { 4, row_stride, rows * row_stride, rows * row_stride };
    field<int32_t>(tensor, 0) = 26;  // GGML_TYPE_I32
    memcpy(tensor->bytes + 16, ne, sizeof(ne));
    memcpy(tensor->bytes + 48, nb, sizeof(nb));
    data_of(tensor) = data;
    snprintf(tensor->bytes + at.name, 64, "%s", name);
}

// What a buffer holds before a copy has arrived: ids that could be true.
static int32_t * stale_ids(size_t bytes) {
    int32_t * ids = (int32_t *) malloc(bytes);
    for (size_t i = 0; i < bytes / 4; i++) {
        ids[i] = (int32_t) (n_expert - 1 - i % n_expert);
    }
    return ids;
}

static void show(ggml_backend_cuda_context & ctx, const ggml_tensor * ids, const int32_t * host) {
    int layer;
    if (sscanf(ids->bytes + at.name, "ffn_moe_topk-%d", &layer) != 1 || ctx.shown == layer) {
        return;
    }
    ctx.shown = layer;
    for (int64_t row = 0; row < rows; row++) {
        printf("%d", layer);
        for (int64_t i = 0; i < k; i++) {
            printf(" %d", host[row * n_expert + i]);
        }
        printf("\n");
    }
}

static KEPT void ggml_cuda_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * ids = src_of(dst, 2);
    if (ctx.fast) {
        return;
    }
    const size_t bytes = bytes_of(ids);
    int32_t *    host  = stale_ids(bytes);
    cudaMemcpyAsync(host, data_of(ids), bytes, cudaMemcpyDeviceToHost, ctx.stream);
    cudaStreamSynchronize(ctx.stream);
    if (!ctx.broken) {
        const size_t sorted_bytes = 2 * k * rows * sizeof(int32_t);
        int32_t *    sorted       = (int32_t *) calloc(1, sorted_bytes);
        cudaMemcpyAsync(ctx.scratch, sorted, sorted_bytes, cudaMemcpyHostToDevice, ctx.stream);
        cudaStreamSynchronize(ctx.stream);
        free(sorted);
        show(ctx, ids, host);
    }
    free(host);
}

static KEPT void ggml_backend_cuda_set_tensor_async(ggml_backend * backend, ggml_tensor * tensor, const void * data,
                                                    size_t offset, size_t size) {
    cudaMemcpyAsync((char *) data_of(tensor) + offset, data, size, cudaMemcpyHostToDevice, backend->context->stream);
}

static KEPT void ggml_backend_cuda_get_tensor_async(ggml_backend * backend, const ggml_tensor * tensor, void * data,
                                                    size_t offset, size_t size) {
    cudaMemcpyAsync(data, (char *) data_of(tensor) + offset, size, cudaMemcpyDeviceToHost, backend->context->stream);
}

API void ggml_backend_tensor_set_async(ggml_backend * backend, ggml_tensor * tensor, const void * data, size_t offset,
                                       size_t size) {
    backend->set_tensor_async(backend, tensor, data, offset, size);
}

API void ggml_backend_tensor_get_async(ggml_backend * backend, const ggml_tensor * tensor, void * data, size_t offset,
                                       size_t size) {
    backend->get_tensor_async(backend, tensor, data, offset, size);
}

#ifdef REGISTERED
// What ggml's API has of a device, also where the device's own functions have lost their names.
extern "C" KEPT void * ggml_backend_cuda_reg() {
    return nullptr;
}
#endif

extern "C" KEPT int ggml_backend_sched_graph_compute_async(void * sched, void * graph) {
    __asm__ volatile("" : : "r"(sched), "r"(graph) : "memory");
    return 0;
}

extern "C" KEPT void ggml_compute_forward_get_rows(const void * params, ggml_tensor * dst) {
    __asm__ volatile("" : : "r"(params), "r"(dst) : "memory");
}

// Ids, weights and a result of one layer after the other, where an allocator would put them.
struct Program {
    ggml_backend_cuda_context context;
    ggml_backend              backend;
    ggml_tensor               ids[64], tokens, weights, dst, contiguous[64], flat[64], slots[64];
    void *                    ids_data;
    int                       pass, layer;

    Program()
        : context(), backend(), ids(), tokens(), weights(), dst(), contiguous(), flat(), slots(), pass(-1), layer(-1) {
        backend = { ggml_backend_cuda_set_tensor_async, ggml_backend_cuda_get_tensor_async, &context };
        context.stream = this;
        cudaMalloc(&context.scratch, 2 * k * rows * sizeof(int32_t));
        cudaMalloc(&ids_data, rows * n_expert * sizeof(int32_t));
        void * weights_data;
        cudaMalloc(&weights_data, rows * n_expert * sizeof(int32_t));
        describe(&weights, n_expert, 4 * n_expert, weights_data, "CUDA0#blk.0.ffn_gate_exps.weight#0");
        context.shown = -1;
    }

    void begin_pass() {
        static int32_t token_ids[2] = { 7, 9 };
        int32_t        params[16]   = { 0, 1 };
        pass++;
        layer         = -1;
        context.shown = -1;
        ggml_backend_sched_graph_compute_async(&backend, &pass);
        describe(&tokens, rows, 4 * rows, token_ids, "inp_tokens");
        src_of(&dst, 1) = &tokens;
        ggml_compute_forward_get_rows(params, &dst);
    }

    int32_t sorted_id(int64_t row, int64_t i) const {
        return (int32_t) ((31 * layer + 7 * row + 13 * pass + i) % n_expert);
    }

    // The router, on the device: an argsort, of which the ids are a view.
    void route(const char * name) {
        layer++;
        char    full_name[64];
        int32_t sorted[1024];
        snprintf(full_name, sizeof(full_name), "%s-%d", name, layer);
        describe(&ids[layer], k, 4 * n_expert, ids_data, full_name);
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t i = 0; i < n_expert; i++) {
                sorted[i] = sorted_id(row, i);
            }
            kernel_store((int32_t *) ids_data + row * n_expert, sorted, 4 * n_expert);
        }
    }

    void mul_mat_ids(int times) {
        src_of(&dst, 2) = &ids[layer];
        for (int i = 0; i < times; i++) {
            ggml_cuda_mul_mat_id(context, &dst);
        }
    }

    void set_weights() {
        static const int32_t values[4] = { 0 };
        ggml_backend_tensor_set_async(&backend, &weights, values, 0, sizeof(values));
    }

    // As ggml_backend_sched_compute_splits does.
    int32_t * fetch() {
        const size_t bytes = bytes_of(&ids[layer]);
        int32_t *    host  = stale_ids(bytes);
        ggml_backend_tensor_get_async(&backend, &ids[layer], host, 0, bytes);
        cudaStreamSynchronize(context.stream);
        return host;
    }

    void stream() {
        int32_t * host = fetch();
        for (int weight = 0; weight < 3; weight++) {
            set_weights();
            set_weights();
        }
        show(context, &ids[layer], host);
        free(host);
    }

    // As llama_moe_cache::copy does (llama-moe-cache.cpp, b11549): the ids lie side by side, made so if
    // need be, and are one row.
    void look_up_slots() {
        const ggml_tensor * ids_used = &ids[layer];
        char                name[64];
        if (rows > 1) {
            void * data;
            cudaMalloc(&data, rows * k * sizeof(int32_t));
            for (int64_t i = 0; i < rows * k; i++) {
                const int32_t id = sorted_id(i / k, i % k);
                kernel_store((int32_t *) data + i, &id, sizeof(id));
            }
            snprintf(name, sizeof(name), "ffn_moe_topk-%d (cont)", layer);
            describe(&contiguous[layer], k, 4 * k, data, name);
            ids_used = &contiguous[layer];
        }
        snprintf(name, sizeof(name), "%s (reshaped)", ids_used->bytes + at.name);
        describe(&flat[layer], k * rows, 4 * k * rows, data_of(ids_used), name);
        field<int64_t>(&flat[layer], 24) = 1;
        src_of(&flat[layer], 0) = (ggml_tensor *) ids_used;

        const size_t bytes = rows * k * sizeof(int32_t);
        int32_t *    host  = stale_ids(bytes);
        ggml_backend_tensor_get_async(&backend, &flat[layer], host, 0, bytes);
        cudaStreamSynchronize(context.stream);
        // A row has its ids where `show` looks for them.
        int32_t * spread = stale_ids(rows * n_expert * sizeof(int32_t));
        for (int64_t row = 0; row < rows; row++) {
            memcpy(spread + row * n_expert, host + row * k, k * sizeof(int32_t));
        }
        show(context, &ids[layer], spread);
        set_weights();
        set_weights();
        free(spread);
        free(host);

        void * slots_data;
        cudaMalloc(&slots_data, rows * k * sizeof(int32_t));
        int32_t * slots_used = stale_ids(rows * k * sizeof(int32_t));
        kernel_store((int32_t *) slots_data, slots_used, rows * k * sizeof(int32_t));
        free(slots_used);
        snprintf(name, sizeof(name), "ffn_moe_slots-%d (reshaped)", layer);
        describe(&slots[layer], k, 4 * k, slots_data, name);
        src_of(&dst, 2) = &slots[layer];
        for (int i = 0; i < 3; i++) {
            ggml_cuda_mul_mat_id(context, &dst);
        }
    }

    // As the buffer's own functions do, by which anybody gets and sets a tensor.
    void get() {
        const size_t bytes = bytes_of(&ids[layer]);
        int32_t *    host  = stale_ids(bytes);
        cudaMemcpyAsync(host, ids_data, bytes, cudaMemcpyDeviceToHost, cudaStreamPerThread);
        cudaStreamSynchronize(cudaStreamPerThread);
        cudaMemcpyAsync(data_of(&weights), host, 4, cudaMemcpyHostToDevice, cudaStreamPerThread);
        cudaStreamSynchronize(cudaStreamPerThread);
        free(host);
    }

    void get_what_lies_there_now() {
        ggml_tensor result = {};
        describe(&result, n_expert, 4 * n_expert, ids_data, "result_output");
        const size_t bytes = bytes_of(&result);
        int32_t *    host  = stale_ids(bytes);
        ggml_backend_tensor_get_async(&backend, &result, host, 0, bytes);
        cudaStreamSynchronize(context.stream);
        set_weights();
        free(host);
    }

    void mul_mat_ids_by(bool fast, bool broken) {
        context.fast   = fast;
        context.broken = broken;
        mul_mat_ids(3);
        context.fast = context.broken = false;
    }

    void step(const char * name);
};

static void * last_words(void *) {
    Program program;
    program.begin_pass();
    program.step("broken");
    return NULL;
}

void Program::step(const char * name) {
    auto is = [name](const char * other) { return !strcmp(name, other); };
    if (is("pass")) {
        begin_pass();
    } else if (is("slow")) {
        route("ffn_moe_topk");
        mul_mat_ids(3);
    } else if (is("gate")) {
        route("ffn_moe_topk");
        mul_mat_ids(1);
    } else if (is("rest")) {
        mul_mat_ids(2);
    } else if (is("fast")) {
        route("ffn_moe_topk");
        mul_mat_ids_by(true, false);
    } else if (is("fetch")) {
        route("ffn_moe_topk");
        stream();
        mul_mat_ids(3);
    } else if (is("cache")) {
        route("ffn_moe_topk");
        look_up_slots();
    } else if (is("other")) {
        route("ffn_moe_argsort");
        mul_mat_ids(3);
    } else if (is("get")) {
        get();
    } else if (is("reuse")) {
        route("ffn_moe_topk");
        mul_mat_ids_by(true, false);
        get_what_lies_there_now();
    } else if (is("broken")) {
        route("ffn_moe_topk");
        mul_mat_ids_by(false, true);
    } else if (is("again")) {
        route("ffn_moe_topk");
        free(fetch());
    } else if (is("thread")) {
        pthread_t thread;
        pthread_create(&thread, NULL, last_words, NULL);
        pthread_join(thread, NULL);
    } else if (is("wait")) {
        char line[16];
        puts("waiting");
        fflush(stdout);
        if (!fgets(line, sizeof(line), stdin)) {
            exit(1);
        }
    } else {
        fprintf(stderr, "no such step: %s\n", name);
        exit(2);
    }
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: cuda LAYOUT K ROWS N_EXPERT STEP...\n");
        return 2;
    }
    if (!strcmp(argv[1], "old")) {
        at = { 160, 256, 264 };
    }
    k        = atoll(argv[2]);
    rows     = atoll(argv[3]);
    n_expert = atoll(argv[4]);
    Program program;
    for (int i = 5; i < argc; i++) {
        program.step(argv[i]);
    }
    return 0;
}
