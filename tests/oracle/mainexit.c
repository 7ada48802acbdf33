// A program whose main thread ends when the first byte comes from standard input, while another thread
// goes on until standard input is closed, and calls a function of ggml's for each further byte; for the
// byte `l` it loads the library that is its argument.

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_t main_thread;

// Without a scheduler, none can end.
__attribute__((noinline)) int ggml_backend_sched_graph_compute_async(void * sched, void * graph) {
    __asm__ volatile("" : : "r"(sched), "r"(graph));
    return 0;
}

__attribute__((noinline)) void ggml_backend_sched_free(void * sched) {
    __asm__ volatile("" : : "r"(sched));
}

static void * go_on(void * library) {
    char byte;
    pthread_join(main_thread, NULL);
    while (read(0, &byte, 1) > 0) {
        if (byte != 'l') {
            ggml_backend_sched_free(&byte);
        } else if (!dlopen(library, RTLD_NOW)) {
            exit(1);
        }
    }
    exit(0);
}

int main(int argc, char ** argv) {
    pthread_t thread;
    char byte;
    if (read(0, &byte, 1) != 1) {
        return 1;
    }
    main_thread = pthread_self();
    if (pthread_create(&thread, NULL, go_on, argc > 1 ? argv[1] : NULL)) {
        return 1;
    }
    pthread_exit(NULL);
}
