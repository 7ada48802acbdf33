// A program whose main thread ends when the first byte comes from standard input, while another thread
// goes on until standard input is closed, and calls the one function of llama.cpp's for each further byte.

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_t main_thread;

__attribute__((noinline)) void llama_free(void * ctx) {
    __asm__ volatile("" : : "r"(ctx));
}

static void * go_on(void * unused) {
    (void) unused;
    char byte;
    pthread_join(main_thread, NULL);
    while (read(0, &byte, 1) > 0) {
        llama_free(&byte);
    }
    exit(0);
}

int main(void) {
    pthread_t thread;
    char byte;
    if (read(0, &byte, 1) != 1) {
        return 1;
    }
    main_thread = pthread_self();
    if (pthread_create(&thread, NULL, go_on, NULL)) {
        return 1;
    }
    pthread_exit(NULL);
}
