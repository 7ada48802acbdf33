// Opens a library at run time and calls its main at once: `loader LIBRARY ARGUMENT...`. With -DFORK a
// child does so after the library was opened, with no exec in between, and the parent ends as it does.
// With -DWAIT it says "waiting" and does so for each line of its standard input.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

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
#ifdef FORK
    pid_t child = fork();
    if (child != 0) {
        int status = 1;
        waitpid(child, &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    }
#endif
#ifdef WAIT
    char line[16];
    int  status = 0;
    while (puts("waiting"), fflush(stdout), status == 0 && fgets(line, sizeof line, stdin)) {
        status = entry(argc - 1, argv + 1);
    }
    return status;
#endif
    exit(entry(argc - 1, argv + 1));
}
