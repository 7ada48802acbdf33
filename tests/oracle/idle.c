// A process to look at: maps the files it is given as code, says "ready", and waits until its standard input
// is closed. The thread id of a second thread, which waits too, follows the word.
//
// With -DHOOKED it defines the function that the tracer probes, as ggml's CPU backend does. With
// -DCONTEXT it defines one of libllama's functions alone. With -DMARKED it contains the name of
// llama.cpp's tensor with the chosen experts.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "function.h"

#ifdef HOOKED
FUNCTION("ggml_compute_forward_get_rows");
#endif
#ifdef CONTEXT
FUNCTION("llama_free");
#endif
#ifdef MARKED
__attribute__((used)) static const char mark[] = "ffn_moe_topk";
#endif

static int thread_id[2];

static void * wait(void * unused) {
    int id = (int) syscall(SYS_gettid);
    (void) unused;
    if (write(thread_id[1], &id, sizeof(id)) == sizeof(id)) {
        pause();
    }
    return NULL;
}

int main(int argc, char ** argv) {
    pthread_t thread;
    int       id;
    char      byte;
    for (int i = 1; i < argc; i++) {
        int file = open(argv[i], O_RDONLY);
        if (file < 0 || mmap(NULL, 1, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0) == MAP_FAILED) {
            perror(argv[i]);
            return 1;
        }
    }
    if (pipe(thread_id) || pthread_create(&thread, NULL, wait, NULL) ||
        read(thread_id[0], &id, sizeof(id)) != sizeof(id)) {
        return 1;
    }
    printf("ready %d\n", id);
    fflush(stdout);
    while (read(0, &byte, 1) > 0) {
    }
    return 0;
}
