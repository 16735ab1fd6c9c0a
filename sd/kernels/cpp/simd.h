// Vectors of fp32 numbers, and functions of them: exp, silu, gelu, transposition.
//
// Vectors are GCC's (clang has them too) of isa.h's width, so the code names no instruction but in `max`, and compiles
// for any processor.
//
// To build by hand what sd/kernels/native.py builds:
//     g++ -std=c++17 -O3 -ffp-contract=fast -march=native -fopenmp -fPIC -fvisibility=hidden -shared *.cpp -o sd.so
// To compare with another version of this folder, kernel by kernel:
//     python bench/cpu_builds.py OTHER_FOLDER
// To test under the address sanitizer, where LD_PRELOAD brings its library into Python:
//     SD_CXXFLAGS="-fsanitize=address -g" ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$(g++ -print-file-name=libasan.so)
//     python -m pytest tests/kernels/test_arithmetic.py tests/kernels/test_dots.py, all in one line

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "isa.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace sd {

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef vec unaligned __attribute__((aligned(4), may_alias));  // in memory, at any address

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline vec load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<unaligned*>(p) = v; }
inline vec load(const float* p, int64_t count) {
    if (count == W) return load(p);
    vec v{};
    memcpy(&v, p, 4 * count);
    return v;
}
inline void store(float* p, vec v, int64_t count) {
    if (count == W) return store(p, v);
    memcpy(p, &v, 4 * count);
}
inline vec broadcast(float x) { return x - vec{}; }  // and not x + vec{}, which makes 0 of -0
inline vec max(vec a, vec b) {
#if SD_WIDTH == 16 && defined(__AVX512F__)  // what gcc makes of the last line waits for a comparison
    return (vec)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);  // gcc 12 warns of the plain one
#elif SD_WIDTH == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// 2^x, relative error 2e-7; 2^-126 below that.
inline vec exp2(vec x) {
    x = max(x, broadcast(-126.0f));
    const vec shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to whole numbers, which the low bits then hold
    const vec f = x - (shifted - 12582912.0f);
    vec p = f * 1.326472663e-3f + 9.671512959e-3f;
    p = p * f + 5.550733748e-2f;
    p = p * f + 2.402224208e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
    const vec power = (vec)(((ivec)shifted << 23) + (127 << 23));
    return p * power;
}

// 2^x for what is rounded to bf16 afterwards, whose error is 4e-3: relative error 8e-5.
inline vec short_exp2(vec x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    const vec p = ((f * 7.802452e-2f + 2.2606716e-1f) * f + 6.9583354e-1f) * f + 9.9992522e-1f;
    return (vec)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)x);  // times 2^floor(x)
#else
    return exp2(x);
#endif
}

// e^x, which stays finite: beyond 2^126 it is that.
inline vec exp(vec x) { return exp2(-max(-x * 1.44269504f, broadcast(-126.0f))); }

inline vec silu(vec x) { return x / (exp(-x) + 1.0f); }

// x * Phi(x), with 1 - Phi by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
inline vec gelu(vec x) {
    const vec z = (x < 0.0f ? -x : x) * 0.70710678f;
    const vec t = 1.0f / (z * 0.3275911f + 1.0f);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec tail = p * t * exp(-z * z) * 0.5f;
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

// W vectors of W, rows to columns.
#if SD_WIDTH == 8  // in steps that AVX2 has instructions for
inline void transpose(vec v[W]) {
    vec pairs[W], fours[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 2) {
        pairs[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 4)
#pragma GCC unroll 8
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = SHUFFLE(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = SHUFFLE(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        v[i] = SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#else
// Of rows i and i + D of a square: their blocks of D x D off the diagonal change places.
template <int D, int... J>
inline void exchange(vec& a, vec& b, std::integer_sequence<int, J...>) {
    const vec above = SHUFFLE(a, b, (J & D ? W + J - D : J)...);
    b = SHUFFLE(a, b, (J & D ? W + J : J + D)...);
    a = above;
}

template <int D = W / 2>
inline void transpose(vec v[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & D)) exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, W>());
    if constexpr (D > 1) transpose<D / 2>(v);
}
#endif

// to [columns, rows] = from [rows, columns] * factor; their rows are ld_to and ld_from apart.
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to, int64_t ld_to,
                      float factor = 1) {
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < columns; j += W) {
            const float* block = from + i * ld_from + j;
            float* transposed = to + j * ld_to + i;
            if (rows - i < W || columns - j < W) {
                for (int64_t c = 0; c < std::min<int64_t>(W, columns - j); c++)
                    for (int64_t r = 0; r < std::min<int64_t>(W, rows - i); r++)
                        transposed[c * ld_to + r] = block[r * ld_from + c] * factor;
                continue;
            }
            vec v[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; r++) v[r] = load(block + r * ld_from) * factor;
            transpose(v);
#pragma GCC unroll 16
            for (int c = 0; c < W; c++) store(transposed + c * ld_to, v[c]);
        }
}

}  // namespace sd
