// Calls the functions that the tracer probes, as llama.cpp does, and tells how long a call takes. The
// functions do nothing, so that what remains is the probe.
//
// It says `ready PID`, and answers each command with `ok NS`, the median time of a call, or `error`:
//
//   thread N         ith is 1: N batches of a MoE layer's GET_ROWS on another thread than the first
//   other N          the index tensor is no one's of a router, nor is dst named
//   scales N         scales of experts are gathered by a router's ids
//   decode K N       one row of K ids, in LAYERS layers of each of N passes
//   paced K N        the same, with PACE_NS between two calls, in which a reader falls asleep
//   prompt K ROWS N  as decode, with ROWS rows
//   wide K ROWS N    the same, of WIDE experts
//   pass TOKENS N    a pass begins, N times
//   quit
//
// Calls are timed in batches; passes begin outside of them, except those of `pass`.

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "function.h"
#include "structs.h"

enum { LAYERS = 48, N_EXPERT = 128, WIDE = 512, MAX_TOKENS = 1024, MAX_BATCHES = 1 << 16, PACE_NS = 200000 };

FUNCTION("ggml_compute_forward_get_rows");
FUNCTION("ggml_backend_sched_graph_compute_async");
FUNCTION("_ZN16llm_graph_result10set_inputsEPK12llama_ubatch");
FUNCTION("_ZN13llama_context14process_ubatchERK12llama_ubatch14llm_graph_type"
         "P22llama_memory_context_iR11ggml_status");

void ggml_compute_forward_get_rows(const void * params, const void * dst);
int  ggml_backend_sched_graph_compute_async(const void * sched, const void * graph);
void set_inputs(const void * result, const void * ubatch)
    __asm__("_ZN16llm_graph_result10set_inputsEPK12llama_ubatch");
void process_ubatch(const void * context, const void * ubatch)
    __asm__("_ZN13llama_context14process_ubatchERK12llama_ubatch14llm_graph_type"
            "P22llama_memory_context_iR11ggml_status");

static struct tensor ids[LAYERS], weights[LAYERS];
static int32_t       sequence, positions[MAX_TOKENS], n_seq_id[MAX_TOKENS];
static int32_t *     seq_id[MAX_TOKENS];
static int8_t        output[MAX_TOKENS];
static int32_t       argsort[MAX_TOKENS * WIDE];
static struct ubatch ubatch;
static int64_t       batches[MAX_BATCHES];
static char          context[8], scheduler[8], graph[64];

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

// Inlined, so that there is more than one call of process_ubatch, as in llama.cpp: of a lone one, the tracer
// takes it that another caller has the function in it, and probes the others, too.
static inline __attribute__((always_inline)) void begin_pass(int tokens) {
    ubatch.n_tokens = ubatch.n_seq_tokens = (uint32_t) tokens;
    process_ubatch(context, &ubatch);
    set_inputs(graph, &ubatch);
    ggml_backend_sched_graph_compute_async(scheduler, graph);
}

static void set_up(int k, int n_expert, int rows, const char * ids_name, const char * dst_name) {
    const size_t stride = (size_t) n_expert * sizeof(argsort[0]);
    for (int i = 0; i < rows * n_expert; i++) {
        argsort[i] = (i / n_expert + i) % n_expert;
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        struct tensor * index = &ids[layer];
        *index = (struct tensor) {
            .type = 26, .ne = { k, rows, 1, 1 },
            .nb = { sizeof(argsort[0]), stride, (size_t) rows * stride, (size_t) rows * stride },
            .data = argsort,
        };
        snprintf(index->name, sizeof(index->name), ids_name, layer);
        weights[layer] = (struct tensor) { .src = { index, index } };
        snprintf(weights[layer].name, sizeof(weights[layer].name), dst_name, layer);
    }
}

static int by_number(const void * a, const void * b) {
    const int64_t x = *(const int64_t *) a, y = *(const int64_t *) b;
    return (x > y) - (x < y);
}

// Times n batches of a call in each layer; each is a pass of its own if it has tokens.
static double time_layers(int n, int tokens, const int32_t * params) {
    for (int i = 0; i < n; i++) {
        if (tokens) {
            begin_pass(tokens);
        }
        const int64_t begin = now();
        for (int layer = 0; layer < LAYERS; layer++) {
            ggml_compute_forward_get_rows(params, &weights[layer]);
        }
        batches[i] = now() - begin;
    }
    qsort(batches, (size_t) n, sizeof(batches[0]), by_number);
    return (double) batches[n / 2] / LAYERS;
}

// The same, with time between the calls, of which each is timed by itself.
static double time_paced(int n, const int32_t * params) {
    for (int i = 0; i < n; i++) {
        begin_pass(1);
        batches[i] = 0;
        int64_t due = now() + PACE_NS;
        for (int layer = 0; layer < LAYERS; layer++, due += PACE_NS) {
            int64_t begin;
            while ((begin = now()) < due) {
            }
            ggml_compute_forward_get_rows(params, &weights[layer]);
            batches[i] += now() - begin;
        }
    }
    qsort(batches, (size_t) n, sizeof(batches[0]), by_number);
    return (double) batches[n / 2] / LAYERS;
}

static double time_passes(int n, int tokens) {
    for (int i = 0; i < n; i++) {
        const int64_t begin = now();
        begin_pass(tokens);
        batches[i] = now() - begin;
    }
    qsort(batches, (size_t) n, sizeof(batches[0]), by_number);
    return (double) batches[n / 2];
}

int main(void) {
    static const int32_t first[2] = { 0, 2 }, second[2] = { 1, 2 };
    for (int i = 0; i < MAX_TOKENS; i++) {
        positions[i] = i;
        n_seq_id[i]  = 1;
        seq_id[i]    = &sequence;
        output[i]    = 1;
    }
    ubatch = (struct ubatch) {
        .b_equal_seqs = 1, .n_seqs = 1, .n_seqs_unq = 1, .n_pos = 1, .pos = positions,
        .n_seq_id = n_seq_id, .seq_id = seq_id, .seq_id_unq = &sequence, .seq_idx = &sequence,
        .output = output,
    };
    printf("ready %d\n", (int) getpid());
    fflush(stdout);
    char line[128], what[16];
    while (fgets(line, sizeof(line), stdin)) {
        int       a = 0, b = 0, n = 0;
        double    ns     = -1;
        const int fields = sscanf(line, "%15s %d %d %d", what, &a, &b, &n);
        const int last   = fields == 4 ? n : fields == 3 ? b : a;
        if (!strcmp(what, "quit")) {
            printf("ok\n");
            return 0;
        }
        if (last > 0 && last <= MAX_BATCHES) {
            if (!strcmp(what, "thread") && fields == 2) {
                set_up(8, N_EXPERT, 1, "ffn_moe_topk-%d", "ffn_moe_weights-%d");
                ns = time_layers(last, 0, second);
            } else if (!strcmp(what, "other") && fields == 2) {
                set_up(8, N_EXPERT, 1, "leaf_%d", "node_%d");
                ns = time_layers(last, 0, first);
            } else if (!strcmp(what, "scales") && fields == 2) {
                set_up(8, N_EXPERT, 1, "ffn_moe_topk-%d", "node_%d");
                ns = time_layers(last, 0, first);
            } else if (!strcmp(what, "decode") && fields == 3 && a <= N_EXPERT) {
                set_up(a, N_EXPERT, 1, "ffn_moe_topk-%d", "ffn_moe_weights-%d");
                ns = time_layers(last, 1, first);
            } else if (!strcmp(what, "paced") && fields == 3 && a <= N_EXPERT) {
                set_up(a, N_EXPERT, 1, "ffn_moe_topk-%d", "ffn_moe_weights-%d");
                ns = time_paced(last, first);
            } else if (!strcmp(what, "prompt") && fields == 4 && a <= N_EXPERT && b <= MAX_TOKENS) {
                set_up(a, N_EXPERT, b, "ffn_moe_topk-%d", "ffn_moe_weights-%d");
                ns = time_layers(last, b, first);
            } else if (!strcmp(what, "wide") && fields == 4 && a <= WIDE && b <= MAX_TOKENS) {
                set_up(a, WIDE, b, "ffn_moe_topk-%d", "ffn_moe_weights-%d");
                ns = time_layers(last, b, first);
            } else if (!strcmp(what, "pass") && fields == 3 && a <= MAX_TOKENS) {
                ns = time_passes(last, a);
            }
        }
        if (ns < 0) {
            printf("error: not understood: %s", line);
        } else {
            printf("ok %.1f\n", ns);
        }
        fflush(stdout);
    }
    return 0;
}
