// A program whose main thread ends when the first byte comes from standard input, while another thread
// goes on until standard input is closed. Its one function of llama.cpp's makes it worth tracing.

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_t main_thread;

void llama_free(void * ctx) {
    (void) ctx;
}

static void * go_on(void * unused) {
    (void) unused;
    char byte;
    pthread_join(main_thread, NULL);
    while (read(0, &byte, 1) > 0) {
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
