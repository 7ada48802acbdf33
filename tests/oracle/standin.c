// Stands in for ggml where the real one cannot be had: tensors of any layout, shape and fault.
//
// It defines the function that the tracer probes, and calls it as ggml's CPU backend does: from two
// threads of a pool (one after the other), with a GET_ROWS node whose src[1] holds expert ids.
//
// Usage: standin LAYOUT K ROWS ID_STRIDE ROW_STRIDE FAULT
//
//   LAYOUT       new (b4106 and newer), old (b3209 to b4105), odd (none that ever was),
//                ancient (new tensors; compute params as before b3209), wide (16 sources per
//                tensor, and those compute params; -DDECLARED has DWARF say so)
//   ID_STRIDE    nb[0] of the ids, ROW_STRIDE nb[1], in bytes
//   FAULT        none, type, planes, absurd (another number in each layer), data, tensor, meaning
//                (the function takes something else), range, suffix, copy, long, endless (a name
//                without its NUL), device (that of a copy for a server); part: see below; half: a second
//                pass of one layer follows
//
// -DSCHEDULED has the pass begin as llama.cpp's do: with a ubatch of ROWS tokens, a scheduler and
// the CPU's part of its graph. With -DINLINED the caller has a copy of the function, which is still there
// for others, as link-time optimisation may leave it. With -DCHECKED the function begins with a condition.
// With -DCALLBACK everything is on a device, and the
// ids of each layer are asked for three times (with the fault `part`, all but the last row's), as an eval
// callback of llama.cpp's programs does, which forgets them at once.
//
// Three layers are computed. Id j of row r in layer l is (31 l + 7 r + j) mod 1024, or mod
// ROW_STRIDE / 4 where the ids lie side by side.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "structs.h"

#ifdef CALLBACK
// There is a device by this, for the tracer.
void * ggml_backend_cuda_reg(void) {
    return NULL;
}
#endif

struct offsets { size_t src, data, name; };

#ifdef DECLARED
struct ggml_tensor {
    int                  type;
    void *               buffer;
    int64_t              ne[4];
    size_t               nb[4];
    int                  op;
    int32_t              op_params[16];
    int32_t              flags;
    struct ggml_tensor * grad;
    struct ggml_tensor * src[16];
    struct ggml_tensor * view_src;
    size_t               view_offs;
    void *               data;
    char                 name[64];
    void *               extra;
};
struct ggml_compute_params { int type, ith, nth; };
typedef struct ggml_compute_params params_t;
typedef struct ggml_tensor tensor_t;
#else
typedef void params_t;
typedef void tensor_t;
#endif

#ifdef LOCKED
// The kernel sets no uprobe on an instruction with a lock prefix.
void ggml_compute_forward_get_rows(const void * params, void * dst);
__asm__(".text\n"
        ".globl ggml_compute_forward_get_rows\n"
        ".type ggml_compute_forward_get_rows, @function\n"
        "ggml_compute_forward_get_rows:\n"
        "    lock addl $0, -8(%rsp)\n"
        "    ret\n"
        ".size ggml_compute_forward_get_rows, . - ggml_compute_forward_get_rows\n");
#else
__attribute__((noinline)) void ggml_compute_forward_get_rows(const params_t * params, tensor_t * dst) {
#ifdef CHECKED
    if (!dst) {
        abort();
    }
#endif
    __asm__ volatile("" : : "r"(params), "r"(dst) : "memory");
}
#endif

#ifdef INLINED
static inline __attribute__((always_inline)) void get_rows(const params_t * params, tensor_t * dst) {
    __asm__ volatile("" : : "r"(params), "r"(dst) : "memory");
}
#else
#define get_rows ggml_compute_forward_get_rows
#endif

#ifdef SCHEDULED
// llm_graph_result::set_inputs
__attribute__((noinline)) void _ZN16llm_graph_result10set_inputsEPK12llama_ubatch(
        void * result, const struct ubatch * ubatch) {
    __asm__ volatile("" : : "r"(result), "r"(ubatch) : "memory");
}

__attribute__((noinline)) int ggml_backend_sched_graph_compute_async(void * sched, void * graph) {
    __asm__ volatile("" : : "r"(sched), "r"(graph) : "memory");
    return 0;
}

__attribute__((noinline)) int ggml_graph_compute(void * graph, void * plan) {
    __asm__ volatile("" : : "r"(graph), "r"(plan) : "memory");
    return 0;
}

// A prompt of one sequence, of which the last token's output is wanted.
static void begin_pass(uint32_t tokens) {
    int32_t   sequence = 0;
    int32_t * pos      = calloc(tokens, sizeof(*pos));
    int32_t * n_seq_id = calloc(tokens, sizeof(*n_seq_id));
    int32_t ** seq_id  = calloc(tokens, sizeof(*seq_id));
    int8_t *  output   = calloc(tokens, sizeof(*output));
    for (uint32_t i = 0; i < tokens; i++) {
        pos[i]      = (int32_t) i;
        n_seq_id[i] = 1;
        seq_id[i]   = &sequence;
        output[i]   = i + 1 == tokens;
    }
    const struct ubatch ubatch = {
        .b_equal_seqs = 1, .n_tokens = tokens, .n_seq_tokens = tokens, .n_seqs = 1, .n_seqs_unq = 1,
        .n_pos = 1, .pos = pos, .n_seq_id = n_seq_id, .seq_id = seq_id, .seq_id_unq = &sequence,
        .seq_idx = &sequence, .output = output,
    };
    // An empty graph: what it computes is told by the calls that follow.
    char graph[64] = { 0 }, scheduler[8];
    _ZN16llm_graph_result10set_inputsEPK12llama_ubatch(scheduler, &ubatch);
    ggml_backend_sched_graph_compute_async(scheduler, graph);
    ggml_graph_compute(graph, NULL);
    free(pos);
    free(n_seq_id);
    free(seq_id);
    free(output);
}
#endif

#ifdef CALLBACK
// Where a device would have the ids.
static const char * device_data;

__attribute__((noinline)) void ggml_backend_tensor_get(
        const void * tensor, void * data, size_t offset, size_t size) {
    __asm__ volatile("" : : "r"(tensor) : "memory");
    memcpy(data, device_data + offset, size);
}

static void ask_for(const void * tensor, size_t size) {
    for (int weight = 0; weight < 3; weight++) {
        char * host = malloc(size);
        ggml_backend_tensor_get(tensor, host, 0, size);
        memset(host, 0xff, size);
        free(host);
    }
}
#endif

static void put(char * tensor, size_t at, const void * value, size_t size) {
    memcpy(tensor + at, value, size);
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: standin LAYOUT K ROWS ID_STRIDE ROW_STRIDE FAULT\n");
        return 2;
    }
    const char *  layout     = argv[1];
    const char *  fault      = argv[6];
    const int64_t k          = atoll(argv[2]);
    const int64_t rows       = atoll(argv[3]);
    const int64_t id_stride  = atoll(argv[4]);
    const int64_t row_stride = atoll(argv[5]);

    struct offsets at = { 152, 248, 256 };
    if (!strcmp(layout, "old")) {
        at = (struct offsets) { 160, 256, 264 };
    } else if (!strcmp(layout, "odd")) {
        at = (struct offsets) { 168, 272, 280 };
    } else if (!strcmp(layout, "wide")) {
        at = (struct offsets) { 160, 304, 312 };
    }
    const int64_t n_expert = id_stride == 4 ? row_stride / 4 : 1024;

    const size_t size = (size_t) (rows * row_stride + k * id_stride) + 64;
    char *       data = calloc(1, size);
    char         tensors[3][512], dst[512], name[80];

#ifdef SCHEDULED
    begin_pass((uint32_t) rows);
#endif
    const int steps = !strcmp(fault, "half") ? 4 : 3;
    for (int step = 0; step < steps; step++) {
        const int layer = step % 3;
        char * ids = tensors[layer];
        memset(ids, 0, sizeof(tensors[layer]));
        memset(dst, 0, sizeof(dst));
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t j = 0; j < k; j++) {
                int32_t id = (int32_t) ((31 * layer + 7 * r + j) % n_expert);
                if (!strcmp(fault, "range") && r == rows - 1 && j == k - 1) {
                    id = 100000;
                }
                put(data, (size_t) (r * row_stride + j * id_stride), &id, sizeof(id));
            }
        }
        const int32_t type  = !strcmp(fault, "type") ? 0 : 26;
        int64_t       ne[4] = { k, rows, !strcmp(fault, "planes") ? 2 : 1, 1 };
        size_t        nb[4] = { (size_t) id_stride, (size_t) row_stride, size, size };
        if (!strcmp(fault, "absurd")) {
            switch (layer) {
                case 0: ne[0] = (int64_t) 1 << 40; break;
                case 1: ne[1] = -1; break;
                case 2: nb[1] = (size_t) 1 << 60; break;
            }
        }
        const void *  where = !strcmp(fault, "data") ? (void *) 64 : data;
        put(ids, 0, &type, sizeof(type));
        put(ids, 16, ne, sizeof(ne));
        put(ids, 48, nb, sizeof(nb));
        put(ids, at.data, &where, sizeof(where));
        const int is_copy = !strcmp(fault, "device");
        snprintf(name, sizeof(name), "%sffn_moe_topk-%d%s",
                 is_copy ? "RPC0[gpu-17.example.net:50052]#" : !strcmp(fault, "copy") ? "CPU#" : "", layer,
                 is_copy ? "#0" : !strcmp(fault, "suffix") ? "x" : !strcmp(fault, "long") ? "0000000" : "");
        put(ids, at.name, name, strlen(name) + 1);
        if (!strcmp(fault, "endless")) {
            memset(ids + at.name + strlen(name), '1', 64 - strlen(name));
        }

#ifdef CALLBACK
        device_data = data;
        const int64_t asked_rows = rows - !strcmp(fault, "part");
        ask_for(ids, (size_t) ((asked_rows - 1) * row_stride + k * id_stride));
        continue;
#endif
        const void * src1 = !strcmp(fault, "tensor") ? (void *) 64 : (void *) ids;
        put(dst, at.src + 8, &src1, sizeof(src1));

        for (int ith = 1; ith >= 0; ith--) {
            // ith, nth; before b3209 a type came first.
            int32_t params[16] = { ith, 2 };
            if (!strcmp(layout, "ancient") || !strcmp(layout, "wide")) {
                params[0] = 1;
                params[1] = ith;
                params[2] = 2;
            }
            if (!strcmp(fault, "meaning")) {
                get_rows((const params_t *) 3, (tensor_t *) 5);
                continue;
            }
            get_rows((const params_t *) params, (tensor_t *) dst);
        }
    }
    free(data);
    return 0;
}
