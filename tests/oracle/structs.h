// What tracers read of ggml's and llama.cpp's structs, as of b11434.

#pragma once

#include <stddef.h>
#include <stdint.h>

// ggml_tensor (ggml.h).
struct tensor {
    int32_t         type;
    void *          buffer;
    int64_t         ne[4];
    size_t          nb[4];
    int32_t         op;
    int32_t         op_params[16];
    int32_t         flags;
    struct tensor * src[10];
    struct tensor * view_src;
    size_t          view_offs;
    void *          data;
    char            name[64];
    void *          extra;
    char            padding[8];
};
_Static_assert(offsetof(struct tensor, src) == 152 && offsetof(struct tensor, data) == 248, "ggml.h");

// llama_ubatch (llama-batch.h).
struct ubatch {
    uint32_t   b_equal_seqs, n_tokens, n_seq_tokens, n_seqs, n_seqs_unq, n_pos;
    int32_t *  token;
    float *    embd;
    int32_t *  pos;
    int32_t *  n_seq_id;
    int32_t ** seq_id;
    int32_t *  seq_id_unq;
    int32_t *  seq_idx;
    int8_t *   output;
};
