// Memory of a thread's own, which stays for the next call: a kernel asks for numbers and gets them uninitialized.
//
// Under the address sanitizer every request is an allocation of exactly its size, so that a step beyond it is found.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace sd {

class Scratch {
    float* data = nullptr;
    int64_t bytes = 0;

public:
#ifdef __SANITIZE_ADDRESS__
    float* get(int64_t numbers) {
        free(data);
        return data = static_cast<float*>(malloc(4 * numbers));
    }
    ~Scratch() { free(data); }
#else
    float* get(int64_t numbers) {
        if (4 * numbers > bytes) {
            if (data) munmap(data, bytes);
            bytes = (4 * numbers + (1 << 21) - 1) >> 21 << 21;
            void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (fresh == MAP_FAILED) {  // no exception may leave a parallel block, and nothing can be computed
                fprintf(stderr, "out of memory: a kernel asked for %lld bytes to work in\n", (long long)bytes);
                abort();
            }
            data = static_cast<float*>(fresh);
            madvise(data, bytes, MADV_HUGEPAGE);  // 36 streams a large stride apart would miss the TLB in small pages
        }
        return data;
    }
    ~Scratch() {
        if (data) munmap(data, bytes);
    }
#endif
};

// Of the calling thread, which all threads of a call read and write; and of each thread for itself. A thread that calls
// is one of those that work, so that it needs both. Inline: one of each for all files of the library.
inline thread_local Scratch shared_scratch, own_scratch;

}  // namespace sd
