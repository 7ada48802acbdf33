// A program whose main thread ends while another goes on, until its standard input is closed.

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_t main_thread;

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
    main_thread = pthread_self();
    if (pthread_create(&thread, NULL, go_on, NULL)) {
        return 1;
    }
    pthread_exit(NULL);
}
