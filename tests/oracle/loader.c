// Opens a library at run time and calls its main at once: `loader LIBRARY ARGUMENT...`.

#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char ** argv) {
    if (argc < 2) {
        return 2;
    }
    void * library = dlopen(argv[1], RTLD_NOW);
    int (*entry)(int, char **) = library ? (int (*)(int, char **)) dlsym(library, "main") : NULL;
    if (!entry) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    return entry(argc - 1, argv + 1);
}
