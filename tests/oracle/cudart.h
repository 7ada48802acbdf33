// The part of NVIDIA's runtime library (cuda_runtime_api.h) that the stand-in has.

#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

#define cudaStreamPerThread ((void *) 2)

int cudaMalloc(void ** address, size_t bytes);
int cudaMemcpyAsync(void * to, const void * from, size_t bytes, int kind, void * stream);
int cudaStreamSynchronize(void * stream);

// What a kernel that computes these values would do.
void kernel_store(void * to, const void * values, size_t bytes);

#ifdef __cplusplus
}
#endif
