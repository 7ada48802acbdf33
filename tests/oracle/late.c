// Loads ggml's CPU backend at run time, and routes tokens at once.
//
// Usage: late LIBGGML_CPU N_EXPERT K TOKENS [wait]
//
// Linked against libggml-base alone. One pass of a scheduler: TOKENS rows of K experts in layer 0; the
// i-th choice of row r is expert (r * K + i) mod N_EXPERT. With `wait`, it prints a line and reads one
// from stdin before the library is opened, and again after each pass, until stdin ends.

#include "ggml-backend.h"
#include "ggml.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int next(int waits) {
    char line[16];
    if (!waits) {
        return 0;
    }
    puts("waiting");
    fflush(stdout);
    return fgets(line, sizeof line, stdin) != NULL;
}

static void route(ggml_backend_t backend, int n_expert, int k, int tokens) {
    struct ggml_init_params params = {ggml_tensor_overhead() * 16 + ggml_graph_overhead(), NULL, true};
    struct ggml_context * ctx = ggml_init(params);
    struct ggml_tensor * probs = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_expert, tokens);
    struct ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, k, tokens);
    ggml_set_name(ids, "ffn_moe_topk-0");
    ggml_set_input(probs);
    ggml_set_input(ids);
    struct ggml_tensor * weights = ggml_get_rows(ctx, probs, ids);
    ggml_set_name(weights, "ffn_moe_weights-0");
    ggml_set_output(weights);
    struct ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, weights);

    ggml_backend_sched_t sched = ggml_backend_sched_new(&backend, NULL, 1, 64, false, false);
    ggml_backend_sched_alloc_graph(sched, graph);
    size_t choices = (size_t) k * tokens;
    int32_t * chosen = malloc(choices * sizeof *chosen);
    for (size_t i = 0; i < choices; i++) {
        chosen[i] = (int32_t) (i % n_expert);
    }
    ggml_backend_tensor_set(ids, chosen, 0, choices * sizeof *chosen);
    ggml_backend_sched_graph_compute(sched, graph);
    free(chosen);
    ggml_backend_sched_free(sched);
    ggml_free(ctx);
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        return 2;
    }
    int waits = argc > 5 && !strcmp(argv[5], "wait");
    next(waits);
    void * library = dlopen(argv[1], RTLD_NOW);
    ggml_backend_t (*init)(void) =
        library ? (ggml_backend_t (*)(void)) dlsym(library, "ggml_backend_cpu_init") : NULL;
    if (!init) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    ggml_backend_t backend = init();
    do {
        route(backend, atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
    } while (next(waits));
    ggml_backend_free(backend);
    return 0;
}
