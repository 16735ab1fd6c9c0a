// The instruction set that this is compiled for, and the sizes that follow from it: the one place that has them.
//
// sd/kernels/native.py gives the compiler's flags for a set, and SD_SET, its name; the sources ask what is theirs here.
//
// A tile of a product is ROWS x VECTORS vectors of sums in registers, beside VECTORS of B and one number of A: of 16
// registers AVX2 so fills 15, of 32 AVX-512 fills 29. (14 x 2 would fill 31, and is as fast on most linear
// layers, but 4 to 6% slower in Winograd's convolutions: bench/README.md.) Sizes of caches are those of a core.

#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifndef SD_SET
#define SD_SET "by hand"
#endif

#if defined(__AMX_TILE__) || defined(SD_AMX_EMULATED)
#define SD_AMX
#endif

#if defined(__AVX512F__) || defined(SD_AMX)
#define SD_WIDTH 16
#elif defined(__AVX__)
#define SD_WIDTH 8
#else  // whatever there is: SSE2, NEON, or what the compiler makes of vectors without either
#define SD_WIDTH 4
#endif

namespace sd {

constexpr int W = SD_WIDTH;  // fp32 numbers in a vector

constexpr int ROWS = 6;                      // of a tile
constexpr int VECTORS = W == 16 ? 4 : 2;     // of a tile's row
constexpr int64_t L2 = W == 4 ? 32 * 1024 : 64 * 1024;  // numbers of B that a thread works on at a time: 256 KB

// Of a tile of bf16 or int8 products, as dot.h has them. AMX: four of its own tiles.
#ifdef SD_AMX
constexpr int DOT_ROWS = 32;
constexpr int DOT_VECTORS = 2;
#else
constexpr int DOT_ROWS = W == 16 ? 6 : 4;
constexpr int DOT_VECTORS = W == 16 ? 4 : 2;
#endif

}  // namespace sd
