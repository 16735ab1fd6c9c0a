// Products of short numbers, bf16 or int8, summed up in fp32 or int32: what linear.cpp's loop is for fp32.
//
// The unit is a group: the four bytes of two bf16 or four int8 numbers along K that one instruction multiplies and adds
// to a sum of 32 bits. B lies in panels of COLUMNS columns, of each panel the taps (see below) one after the other, and
// in a tap blocks of 16 groups:
//
//     [panel][tap][block of 16 groups][vector of the panel][group][column of the vector] of 4 bytes
//
// which is an AMX tile (16 rows of 64 bytes) for each block and vector, and for the dot products of AVX-512 one vector a
// group. Three ways do the arithmetic: AMX's tiles, the dot products of AVX512-BF16 and AVX512-VNNI, and for what has
// neither fp32 and int32 vectors.
//
// A is read where it lies, a pointer a row. A tap is a part of K that has an offset of its own into A's rows: the nine
// neighbours of a position, so that a 3x3 convolution is a product without its patches ever in memory; or a part of a
// long K. AMX reads 16 rows at a time, which must lie at one distance.
//
// How to build and to compare: simd.h.

#pragma once

#include "simd.h"

namespace sd {

constexpr int GROUPS = 16;                  // of a block: 64 bytes of a row
constexpr int COLUMNS = DOT_VECTORS * W;    // of a panel
constexpr int64_t VECTOR_BYTES = GROUPS * W * 4;             // of a panel, in a block
constexpr int64_t BLOCK_BYTES = DOT_VECTORS * VECTOR_BYTES;  // of all its vectors
constexpr int MOST_TAPS = 32;

struct Bf16 {
    typedef uint16_t A;
    typedef uint16_t B;
    typedef float Sum;
    typedef vec Sums;
    static constexpr int GROUP = 2;
    static constexpr A ZERO = 0;
};

struct Int8 {
    typedef uint8_t A;
    typedef int8_t B;
    typedef int32_t Sum;
    typedef ivec Sums;
    static constexpr int GROUP = 4;
};

struct Taps {
    int count;
    int64_t groups;           // of each
    int64_t a[MOST_TAPS];     // bytes from a row's pointer
    int64_t b[MOST_TAPS];     // bytes from a panel's
};

inline ivec load_bytes(const char* p) {
    ivec v;
    memcpy(&v, p, sizeof v);
    return v;
}

// ---- fp32 to bf16, to the nearest and of two as near to the even one, as PyTorch does it

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // a NaN stays one
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

typedef int16_t short_vec __attribute__((vector_size(2 * W)));
typedef int8_t byte_vec __attribute__((vector_size(W)));

inline void store_bf16(uint16_t* p, vec x) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const ivec bits = (ivec)x;
    const ivec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const short_vec narrow = __builtin_convertvector(x == x ? rounded : ivec{} + 0x7fc0, short_vec);
    memcpy(p, &narrow, sizeof narrow);
#endif
}

inline vec load_bf16(const uint16_t* p) {
    short_vec narrow;
    memcpy(&narrow, p, sizeof narrow);
    return (vec)(__builtin_convertvector(narrow, ivec) << 16);
}

// x * factor to the nearest whole number, plus zero, within 0 and 255. A NaN becomes 0.
inline void store_u8(uint8_t* p, vec x, float factor, float zero) {
    vec y = x * factor + zero;
    y = max(y, broadcast(0.0f));
    y = -max(broadcast(-255.0f), -y);
    const byte_vec narrow = __builtin_convertvector(__builtin_convertvector(y + 0.5f, ivec), byte_vec);
    memcpy(p, &narrow, sizeof narrow);
}

// ---- a block of sums by dot products of vectors

inline vec dot(vec sum, ivec a, ivec b, Bf16) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const ivec high = ivec{} + int32_t(0xffff0000);
    sum += (vec)(a << 16) * (vec)(b << 16);
    return sum + (vec)(a & high) * (vec)(b & high);
#endif
}

inline ivec dot(ivec sum, ivec a, ivec b, Int8) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum += ((a >> (8 * i)) & 255) * ((b << (24 - 8 * i)) >> 24);
    return sum;
#endif
}

// sums [R, COLUMNS] (+)= R rows of A times a panel, of which V vectors are computed.
template <class N, int R, int V>
void dot_rows(const char* const* rows, const Taps& taps, const char* b, typename N::Sum* sums, bool first) {
    typename N::Sums sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
            sum[i][j] = typename N::Sums{};
            if (!first) memcpy(&sum[i][j], sums + i * COLUMNS + j * W, sizeof sum[i][j]);
        }
    for (int t = 0; t < taps.count; t++) {
        const char* a[R];
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) a[i] = rows[i] + taps.a[t];
        const char* block = b + taps.b[t];
        for (int64_t left = taps.groups; left > 0; left -= GROUPS, block += BLOCK_BYTES) {
            const int64_t end = std::min<int64_t>(left, GROUPS) * 4;
            for (int64_t g = 0; g < end; g += 4) {
                ivec row[V];
#pragma GCC unroll 16
                for (int j = 0; j < V; j++) row[j] = load_bytes(block + g * W + j * VECTOR_BYTES);
#pragma GCC unroll 16
                for (int i = 0; i < R; i++) {
                    int32_t group;
                    memcpy(&group, a[i] + g, 4);
                    const ivec number = ivec{} + group;
#pragma GCC unroll 16
                    for (int j = 0; j < V; j++) sum[i][j] = dot(sum[i][j], number, row[j], N());
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < R; i++) a[i] += 4 * GROUPS;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) memcpy(sums + i * COLUMNS + j * W, &sum[i][j], sizeof sum[i][j]);
}

// ---- or by AMX's tiles

#ifdef SD_AMX

#ifdef SD_AMX_EMULATED  // in plain C++, to test without them what is written for them
struct Tile {
    alignas(64) char row[16][64];
};
inline thread_local Tile tiles[8];
inline void tile_dot(int c, int a, int b, Bf16) {
    float sums[16][16];
    memcpy(sums, tiles[c].row, sizeof sums);
    for (int i = 0; i < 16; i++)
        for (int g = 0; g < 16; g++)
            for (int j = 0; j < 16; j++)
                for (int s = 0; s < 2; s++) {
                    uint16_t x, y;
                    memcpy(&x, tiles[a].row[i] + 4 * g + 2 * s, 2);
                    memcpy(&y, tiles[b].row[g] + 4 * j + 2 * s, 2);
                    sums[i][j] += from_bf16(x) * from_bf16(y);
                }
    memcpy(tiles[c].row, sums, sizeof sums);
}
inline void tile_dot(int c, int a, int b, Int8) {
    int32_t sums[16][16];
    memcpy(sums, tiles[c].row, sizeof sums);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
            for (int k = 0; k < 64; k++) sums[i][j] += uint8_t(tiles[a].row[i][k]) * tiles[b].row[k / 4][4 * j + k % 4];
    memcpy(tiles[c].row, sums, sizeof sums);
}
#define TILE_ZERO(t) memset(&tiles[t], 0, sizeof tiles[t])
inline void tile_load(int t, const char* p, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(tiles[t].row[i], p + i * stride, 64);
}
inline void tile_store(int t, char* p, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(p + i * stride, tiles[t].row[i], 64);
}
#define TILE_LOAD(t, p, stride) tile_load(t, p, stride)
#define TILE_STORE(t, p, stride) tile_store(t, p, stride)
#define TILE_DOT(N, c, a, b) tile_dot(c, a, b, N())
struct TilesInUse {};
#else
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT(N, c, a, b)                      \
    do {                                          \
        if constexpr (N::GROUP == 2)              \
            _tile_dpbf16ps(c, a, b);              \
        else                                      \
            _tile_dpbusd(c, a, b);                \
    } while (0)

// The tiles of the thread that holds it: eight of 16 rows of 64 bytes.
struct TilesInUse {
    TilesInUse() {
        struct __attribute__((packed)) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        _tile_loadconfig(&config);
    }
    ~TilesInUse() { _tile_release(); }
};
#endif

// sums [16 or 32, COLUMNS] (+)= one or two times 16 rows of A, each at a distance of its own, times V vectors of a panel.
template <class N, int V>
void tile_rows(const char* const a[2], const int64_t lda[2], int halves, const Taps& taps, const char* b,
               typename N::Sum* sums, bool first) {
    constexpr int64_t ld = COLUMNS * 4;
    char* c = reinterpret_cast<char*>(sums);
    if (first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, c, ld);
        if (V == 2) TILE_LOAD(1, c + 64, ld);
        if (halves == 2) TILE_LOAD(2, c + 16 * ld, ld);
        if (V == 2 && halves == 2) TILE_LOAD(3, c + 16 * ld + 64, ld);
    }
    for (int t = 0; t < taps.count; t++) {
        const char *a0 = a[0] + taps.a[t], *a1 = a[1] + taps.a[t], *block = b + taps.b[t];
        for (int64_t left = taps.groups; left > 0; left -= GROUPS, a0 += 64, a1 += 64, block += BLOCK_BYTES) {
            TILE_LOAD(4, a0, lda[0]);
            TILE_LOAD(6, block, 64);
            TILE_DOT(N, 0, 4, 6);
            if (V == 2) {
                TILE_LOAD(7, block + VECTOR_BYTES, 64);
                TILE_DOT(N, 1, 4, 7);
            }
            if (halves == 2) {
                TILE_LOAD(5, a1, lda[1]);
                TILE_DOT(N, 2, 5, 6);
                if (V == 2) TILE_DOT(N, 3, 5, 7);
            }
        }
    }
    TILE_STORE(0, c, ld);
    if (V == 2) TILE_STORE(1, c + 64, ld);
    if (halves == 2) TILE_STORE(2, c + 16 * ld, ld);
    if (V == 2 && halves == 2) TILE_STORE(3, c + 16 * ld + 64, ld);
}
#else
struct TilesInUse {};
#endif

// ---- whichever of them this is built for

// sums [count, COLUMNS] (+)= up to DOT_ROWS rows of A times `vectors` of a panel's. AMX: rows lie at one distance in
// each 16, and as many can be read as make 16 whole.
template <class N, int R = DOT_ROWS, int V = DOT_VECTORS>
inline void some_dots(int count, int vectors, const char* const* rows, const Taps& taps, const char* b,
                      typename N::Sum* sums, bool first) {
    if constexpr (V > 1)
        if (vectors < V) return some_dots<N, R, V - 1>(count, vectors, rows, taps, b, sums, first);
#ifdef SD_AMX
    const char* const a[2] = {rows[0], rows[count > 16 ? 16 : 0]};
    const int64_t lda[2] = {count > 1 ? rows[1] - rows[0] : 0, count > 17 ? rows[17] - rows[16] : 0};
    tile_rows<N, V>(a, lda, count > 16 ? 2 : 1, taps, b, sums, first);
#else
    if constexpr (R > 1)
        if (count < R) return some_dots<N, R - 1, V>(count, vectors, rows, taps, b, sums, first);
    dot_rows<N, R, V>(rows, taps, b, sums, first);
#endif
}

}  // namespace sd
