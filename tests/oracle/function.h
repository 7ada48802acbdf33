// A function to probe, which does nothing. The first instruction decides what a probe costs: it is that
// of compilers' functions, where one without a body would begin with `ret`, which the kernel steps through.

#pragma once

#if defined(__x86_64__)
#define BODY "    push %rbp\n    pop %rbp\n    ret\n"
#elif defined(__aarch64__)
#define BODY "    stp x29, x30, [sp, #-16]!\n    ldp x29, x30, [sp], #16\n    ret\n"
#endif
#define FUNCTION(name)                                                                             \
    __asm__(".text\n.globl " name "\n.type " name ", %function\n.p2align 4\n" name ":\n" BODY      \
            ".size " name ", . - " name "\n")
