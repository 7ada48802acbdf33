// Stands in for NVIDIA's runtime library, with a device that is memory the host may not read.
//
// A copy to the host has arrived when the host has waited for its stream, and not before.

#include "cudart.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { DEVICE_BYTES = 64 << 20, COPIES = 64 };

struct copy {
    void *       to;
    const void * from;
    size_t       bytes;
    void *       stream;
};

// Addresses that mean something to the device alone, and what is there.
static char *      device;
static char *      memory;
static size_t      used;
static struct copy waiting[COPIES];
static int         waiting_copies;

static void * on_device(const void * address) {
    size_t offset = (size_t) ((const char *) address - device);
    if (!device || offset >= DEVICE_BYTES) {
        abort();
    }
    return memory + offset;
}

int cudaMalloc(void ** address, size_t bytes) {
    if (!device) {
        device = mmap(NULL, DEVICE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memory = malloc(DEVICE_BYTES);
    }
    if (device == MAP_FAILED || !memory || used + bytes > DEVICE_BYTES) {
        return 2;  // cudaErrorMemoryAllocation
    }
    *address = device + used;
    used += (bytes + 255) / 256 * 256;
    return 0;
}

int cudaMemcpyAsync(void * to, const void * from, size_t bytes, int kind, void * stream) {
    if (kind == cudaMemcpyHostToDevice) {
        // Memory that is not pinned has been staged when the call returns.
        memcpy(on_device(to), from, bytes);
        return 0;
    }
    if (kind != cudaMemcpyDeviceToHost || waiting_copies == COPIES) {
        return 1;  // cudaErrorInvalidValue
    }
    waiting[waiting_copies++] = (struct copy) { to, on_device(from), bytes, stream };
    return 0;
}

int cudaStreamSynchronize(void * stream) {
    int left = 0;
    for (int i = 0; i < waiting_copies; i++) {
        if (waiting[i].stream == stream) {
            memcpy(waiting[i].to, waiting[i].from, waiting[i].bytes);
        } else {
            waiting[left++] = waiting[i];
        }
    }
    waiting_copies = left;
    return 0;
}

void kernel_store(void * to, const void * values, size_t bytes) {
    memcpy(on_device(to), values, bytes);
}
