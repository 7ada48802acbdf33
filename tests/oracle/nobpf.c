// Runs a program whose bpf(2) fails: `nobpf COMMAND ERRNO PROGRAM ARGUMENT...`. COMMAND is the number
// of a bpf command (include/uapi/linux/bpf.h), or "all"; COMMAND/BYTES is one whose attributes are so long.

#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char ** argv) {
    if (argc < 4) {
        return 2;
    }
    const unsigned all     = !strcmp(argv[1], "all");
    const unsigned command = (unsigned) atoi(argv[1]);
    const char *   slash   = strchr(argv[1], '/');
    const unsigned any     = !slash;
    const unsigned bytes   = slash ? (unsigned) atoi(slash + 1) : 0;
    const unsigned error   = (unsigned) atoi(argv[2]);
    // The low halves of the first and third argument, on the little-endian machines we know.
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_bpf, 0, 6),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, command, 0, all ? 3 : 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, bytes, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JA, any ? 0 : 1, 0, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]), filter };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
        perror("prctl");
        return 1;
    }
    execvp(argv[3], argv + 3);
    perror(argv[3]);
    return 127;
}
