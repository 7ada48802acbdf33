// Shows ids to the tracer as llama.cpp does, of any shape, as fast as it can or at a given pace.
//
// It says `ready PID`, and answers each command with `ok NS`, the time it took, or `error`:
//
//   passes N NS CONTEXTS ROWS LAYERS K EXPERTS
//          N passes, each begun NS nanoseconds after the one before, or at once if that is too late; of
//          CONTEXTS contexts by turns; with ROWS tokens, which choose K of EXPERTS in each of LAYERS
//   quit
//
// The functions do nothing, so that what remains of a pass is the tracing of it.

#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "function.h"
#include "structs.h"

enum { MAX_ROWS = 2048, MAX_LAYERS = 128, MAX_EXPERTS = 512, MAX_CONTEXTS = 16 };

FUNCTION("ggml_compute_forward_get_rows");
FUNCTION("ggml_backend_sched_graph_compute_async");
FUNCTION("_ZN16llm_graph_result10set_inputsEPK12llama_ubatch");

void ggml_compute_forward_get_rows(const void * params, const void * dst);
int  ggml_backend_sched_graph_compute_async(const void * sched, const void * graph);
void set_inputs(const void * result, const void * ubatch)
    __asm__("_ZN16llm_graph_result10set_inputsEPK12llama_ubatch");

static struct tensor ids[MAX_LAYERS], weights[MAX_LAYERS];
// Row r begins with experts r, r + 1, … (mod their number). A layer, and a pass, begin at another row.
static int32_t argsort[(MAX_ROWS + MAX_EXPERTS) * MAX_EXPERTS];
static int32_t sequence, positions[MAX_ROWS], n_seq_id[MAX_ROWS];
static int32_t * seq_id[MAX_ROWS];
static int8_t  output[MAX_ROWS];
static char    contexts[MAX_CONTEXTS][8], graph[64];

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void wait_until(int64_t ns) {
    const struct timespec time = { ns / 1000000000, ns % 1000000000 };
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR) {
    }
}

static void set_up(int rows, int layers, int k, int experts) {
    for (int row = 0; row < MAX_ROWS + MAX_EXPERTS; row++) {
        for (int j = 0; j < experts; j++) {
            argsort[row * experts + j] = (row + j) % experts;
        }
    }
    const size_t stride = (size_t) experts * sizeof(argsort[0]);
    for (int layer = 0; layer < layers; layer++) {
        ids[layer] = (struct tensor) {
            .type = 26, .ne = { k, rows, 1, 1 },
            .nb = { sizeof(argsort[0]), stride, (size_t) rows * stride, (size_t) rows * stride },
        };
        snprintf(ids[layer].name, sizeof(ids[layer].name), "ffn_moe_topk-%d", layer);
        weights[layer] = (struct tensor) { .src = { &ids[layer], &ids[layer] } };
    }
}

static void pass(int number, int count, int rows, int layers, int experts) {
    for (int i = 0; i < rows; i++) {
        positions[i] = rows == 1 ? 1000 + number / count : i;
        output[i]    = i + 1 == rows;
    }
    const struct ubatch ubatch = {
        .b_equal_seqs = 1, .n_tokens = (uint32_t) rows, .n_seq_tokens = (uint32_t) rows, .n_seqs = 1,
        .n_seqs_unq = 1, .n_pos = 1, .pos = positions, .n_seq_id = n_seq_id, .seq_id = seq_id,
        .seq_id_unq = &sequence, .seq_idx = &sequence, .output = output,
    };
    set_inputs(graph, &ubatch);
    ggml_backend_sched_graph_compute_async(contexts[number % count], graph);
    // ith, nth
    const int32_t params[16] = { 0, 1 };
    for (int layer = 0; layer < layers; layer++) {
        ids[layer].data = &argsort[(31 * layer + 7 * number) % experts * experts];
        ggml_compute_forward_get_rows(params, &weights[layer]);
    }
}

int main(void) {
    for (int i = 0; i < MAX_ROWS; i++) {
        n_seq_id[i] = 1;
        seq_id[i]   = &sequence;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("ready %d\n", getpid());
    char line[256];
    while (fgets(line, sizeof(line), stdin)) {
        int       n, count, rows, layers, k, experts;
        long long ns;
        if (!strcmp(line, "quit\n")) {
            puts("ok");
            return 0;
        }
        if (sscanf(line, "passes %d %lld %d %d %d %d %d", &n, &ns, &count, &rows, &layers, &k, &experts) != 7
                || count < 1 || count > MAX_CONTEXTS || rows < 1 || rows > MAX_ROWS || layers < 1
                || layers > MAX_LAYERS || k < 1 || k > experts || experts > MAX_EXPERTS) {
            puts("error: see the top of flood.c");
            continue;
        }
        set_up(rows, layers, k, experts);
        const int64_t begin = now();
        for (int i = 0; i < n; i++) {
            if (ns > 0) {
                wait_until(begin + i * ns);
            }
            pass(i, count, rows, layers, experts);
        }
        // The last pass has its time, too.
        if (ns > 0) {
            wait_until(begin + n * ns);
        }
        printf("ok %lld\n", (long long) (now() - begin));
    }
    return 1;
}
