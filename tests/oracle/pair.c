// Opens two copies of the stand-in as libraries, and has both compute at the same time, each on a thread
// of its own: `pair PASSES LIBRARY LAYOUT K ROWS ID_STRIDE ROW_STRIDE FAULT LIBRARY LAYOUT ...`. It says
// "waiting" when both are open, and begins when a line comes.

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { ARGUMENTS = 7 };

struct copy { int (*entry)(int, char **); char ** arguments; int passes; };

static void * compute(void * data) {
    struct copy * copy = data;
    for (int i = 0; i < copy->passes; i++) {
        copy->entry(ARGUMENTS, copy->arguments);
    }
    return NULL;
}

int main(int argc, char ** argv) {
    struct copy copies[2];
    pthread_t   threads[2];
    char        line[16];
    if (argc != 2 + 2 * ARGUMENTS) {
        return 2;
    }
    for (int i = 0; i < 2; i++) {
        char ** arguments = argv + 2 + i * ARGUMENTS;
        void *  library = dlopen(arguments[0], RTLD_NOW);
        copies[i] = (struct copy) { NULL, arguments, atoi(argv[1]) };
        copies[i].entry = library ? (int (*)(int, char **)) dlsym(library, "main") : NULL;
        if (!copies[i].entry) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
    }
    puts("waiting");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) {
        return 1;
    }
    for (int i = 0; i < 2; i++) {
        pthread_create(&threads[i], NULL, compute, &copies[i]);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    puts("waiting");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
    }
    return 0;
}
