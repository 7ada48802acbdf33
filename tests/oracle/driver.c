// Decodes what it is told to, with the libllama of any build from 2024 on, by others or by us.
//
// It is the smallest user of llama.cpp: a model, a context of default parameters with two threads, and
// llama_decode. No header of llama.cpp is needed, so that one program serves libraries of which nothing
// but the binary is there, of versions years apart. driver.py does the same inside a Python process.
//
// Usage: driver --library LIBLLAMA.SO MODEL.gguf     a shared libllama, opened at run time
//        driver MODEL.gguf                           compiled with -DLINKED, linked with a libllama
//
// Prints `ready` when the model is loaded and a context is there. Then each line of standard input,
// `decode TOKEN...`, continues sequence 0 by these tokens in one call, and is answered by `done`. At
// the end of standard input everything is freed. Whatever fails is told on standard error, and the
// exit status is 1. A context holds 512 tokens, llama.cpp's default.
//
// # Structs of unknown size
//
// Parameters and batches are passed and returned by value, and change from version to version. All of
// them have more than 16 bytes and no member that needs an alignment of more than 8. Such a struct
// passes through memory:
//
// - x86-64 (System V ABI, 3.2.3, class MEMORY): as an argument, a copy lies on the stack, where the
//   arguments without a register begin; all other arguments here are in registers, so it is the only
//   one there. To be returned, the caller hands over the address of its memory in rdi.
// - aarch64 (AAPCS64, 6.8.2 stage B, and 6.9): as an argument, the address of a copy is passed like
//   a pointer. To be returned, the address of memory is in x8.
//
// Either way the callee reads or writes the first bytes of that memory, and it does no harm that there
// is more of it. So one struct that is larger than all of them stands for all of them. What a library
// has returned goes back to the same library, and nothing here looks into it.
//
// Compile this file without -flto: with it, a compiler could compare these declarations with
// llama.cpp's own, and inline across the difference.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <libgen.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/// More than one, so that a tracer has to tell threads apart. llama.cpp's default of 4 is too many for a
/// machine with 2 processors: they wait for each other at every node of a graph.
enum { N_THREADS = 2 };

/// Any of llama.cpp's structs. The largest, `llama_context_params`, has less than 200 bytes in 2026.
struct by_value {
    uint64_t words[128];
};

/// Functions of libllama's API. Not all versions have the last two arguments of `batch_get_one`, the
/// position of the first token and the sequence; those that lack them do not look at their registers.
struct api {
    void (*backend_init)(void);
    void (*backend_free)(void);
    struct by_value (*model_default_params)(void);
    struct by_value (*context_default_params)(void);
    void * (*model_load)(const char * path, struct by_value params);
    void * (*context_init)(void * model, struct by_value params);
    void (*set_n_threads)(void * context, int32_t n_threads, int32_t n_threads_batch);
    struct by_value (*batch_get_one)(int32_t * tokens, int32_t n_tokens, int32_t position, int32_t sequence);
    int32_t (*decode)(void * context, struct by_value batch);
    void (*context_free)(void * context);
    void (*model_free)(void * model);
};

static bool fail(const char * what, const char * why) {
    fprintf(stderr, "driver: %s: %s\n", what, why);
    return false;
}

#ifdef LINKED

void            llama_backend_init(void);
void            llama_backend_free(void);
struct by_value llama_model_default_params(void);
struct by_value llama_context_default_params(void);
void *          llama_model_load_from_file(const char * path, struct by_value params);
void *          llama_init_from_model(void * model, struct by_value params);
void            llama_set_n_threads(void * context, int32_t n_threads, int32_t n_threads_batch);
struct by_value llama_batch_get_one(int32_t * tokens, int32_t n_tokens, int32_t position, int32_t sequence);
int32_t         llama_decode(void * context, struct by_value batch);
void            llama_free(void * context);
void            llama_model_free(void * model);

static const struct api linked = {
    .backend_init           = llama_backend_init,
    .backend_free           = llama_backend_free,
    .model_default_params   = llama_model_default_params,
    .context_default_params = llama_context_default_params,
    .model_load             = llama_model_load_from_file,
    .context_init           = llama_init_from_model,
    .set_n_threads          = llama_set_n_threads,
    .batch_get_one          = llama_batch_get_one,
    .decode                 = llama_decode,
    .context_free           = llama_free,
    .model_free             = llama_model_free,
};

static bool find_api(int * argc, char *** argv, struct api * api) {
    (void) argc;
    (void) argv;
    *api = linked;
    return true;
}

#else

/// Finds a function by one of two names, of which the second may be NULL. Versions before b4433
/// (January 2025) have other names for some.
static bool find(void * library, const char * name, const char * old_name, void * function) {
    void * symbol = dlsym(library, name);
    if (symbol == NULL && old_name != NULL) {
        symbol = dlsym(library, old_name);
    }
    if (symbol == NULL) {
        return fail(name, "not in the library");
    }
    memcpy(function, &symbol, sizeof(symbol));
    return true;
}

/// Loads the backends that are libraries of their own, from the directory of libllama: in such builds
/// not even the CPU is there before.
static bool load_backends(void * library, const char * path) {
    void (*load)(const char * directory) = NULL;
    void * symbol = dlsym(library, "ggml_backend_load_all_from_path");
    if (symbol == NULL) {
        return true;
    }
    memcpy(&load, &symbol, sizeof(symbol));
    char * copy = strdup(path);
    if (copy == NULL) {
        return fail(path, strerror(errno));
    }
    load(dirname(copy));
    free(copy);
    return true;
}

static bool find_api(int * argc, char *** argv, struct api * api) {
    if (*argc < 3 || strcmp((*argv)[1], "--library") != 0) {
        return fail("usage", "driver --library LIBLLAMA.SO MODEL.gguf");
    }
    const char * path    = (*argv)[2];
    void *       library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (library == NULL) {
        return fail(path, dlerror());
    }
    *argc -= 2;
    *argv += 2;
    return find(library, "llama_backend_init", NULL, &api->backend_init) &&
           find(library, "llama_backend_free", NULL, &api->backend_free) &&
           find(library, "llama_model_default_params", NULL, &api->model_default_params) &&
           find(library, "llama_context_default_params", NULL, &api->context_default_params) &&
           find(library, "llama_model_load_from_file", "llama_load_model_from_file", &api->model_load) &&
           find(library, "llama_init_from_model", "llama_new_context_with_model", &api->context_init) &&
           find(library, "llama_set_n_threads", NULL, &api->set_n_threads) &&
           find(library, "llama_batch_get_one", NULL, &api->batch_get_one) &&
           find(library, "llama_decode", NULL, &api->decode) &&
           find(library, "llama_free", NULL, &api->context_free) &&
           find(library, "llama_model_free", "llama_free_model", &api->model_free) &&
           load_backends(library, path);
}

#endif

/// Reads the tokens of a command into memory that grows; their number, or -1 after an error.
static int read_command(char * line, int32_t ** tokens, int * capacity) {
    static const char blanks[] = " \n";
    const char *      command  = strtok(line, blanks);
    if (command == NULL || strcmp(command, "decode") != 0) {
        fail(command == NULL ? "" : command, "not a command");
        return -1;
    }
    int n = 0;
    for (const char * word; (word = strtok(NULL, blanks)) != NULL; n++) {
        if (n == *capacity) {
            *capacity = 2 * n + 64;
            *tokens   = realloc(*tokens, (size_t) *capacity * sizeof(**tokens));
            if (*tokens == NULL) {
                fail(command, strerror(errno));
                return -1;
            }
        }
        char *     end;
        const long token = strtol(word, &end, 10);
        if (*end != '\0' || token < 0 || token > INT32_MAX) {
            fail(word, "not a token");
            return -1;
        }
        (*tokens)[n] = (int32_t) token;
    }
    if (n == 0) {
        fail(command, "no token");
        return -1;
    }
    return n;
}

static bool serve(const struct api * api, void * context) {
    char *    line     = NULL;
    size_t    length   = 0;
    int32_t * tokens   = NULL;
    int       capacity = 0;
    int32_t   position = 0;
    bool      ok       = true;
    while (ok && getline(&line, &length, stdin) > 0) {
        const int n = read_command(line, &tokens, &capacity);
        ok          = n > 0;
        if (ok && api->decode(context, api->batch_get_one(tokens, n, position, 0)) != 0) {
            ok = fail("decode", "llama_decode failed");
        }
        if (ok) {
            position += n;
            puts("done");
            fflush(stdout);
        }
    }
    free(tokens);
    free(line);
    return ok;
}

int main(int argc, char ** argv) {
    struct api api;
    if (!find_api(&argc, &argv, &api)) {
        return 1;
    }
    if (argc != 2) {
        fail("usage", "one model");
        return 1;
    }
    api.backend_init();
    void * model = api.model_load(argv[1], api.model_default_params());
    if (model == NULL) {
        fail(argv[1], "not loaded");
        return 1;
    }
    void * context = api.context_init(model, api.context_default_params());
    bool   ok      = context != NULL || fail(argv[1], "no context");
    if (ok) {
        api.set_n_threads(context, N_THREADS, N_THREADS);
        puts("ready");
        fflush(stdout);
        ok = serve(&api, context);
        api.context_free(context);
    }
    api.model_free(model);
    api.backend_free();
    return ok ? 0 : 1;
}
