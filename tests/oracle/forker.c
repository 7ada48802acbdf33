// Opens a library, forks, and has the child call the library's main: `forker LIBRARY ARGUMENT...`.
// No exec stands between the fork and the child's work. The parent ends as the child does.

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
    pid_t child = fork();
    if (child == 0) {
        exit(entry(argc - 1, argv + 1));
    }
    int status = 1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
