// The loop on which everything rests, `micro`: a tile of ROWS x PANEL numbers of a matrix product, kept in registers.
//
// B comes in panels: all of K, PANEL columns at a time, side by side in memory. A is read where it lies. The tile's size
// is isa.h's; sd_vector and sd_panel (sizes.cpp) tell it to Python.
//
// How to build and to compare: simd.h.

#pragma once

#include "simd.h"

namespace sd {

constexpr int PANEL = VECTORS * W;  // columns of a tile, and so of a panel of B
constexpr int HALF = PANEL / 2;     // of which values and gates of GEGLU take as many each
constexpr int64_t DEPTH = 1280;     // most numbers that are summed up at once; a panel of them comes from L2


enum Kind { PLAIN, TRANSPOSED, GEGLU };

struct Out {
    float* c;
    int64_t ldc;
    const float* bias;      // of these columns, or null
    const float* residual;  // as c lies, or null
};

// C[R, PANEL] (+)= A[R, K] B[K, PANEL]; the first pass starts from the bias, the last adds the residual.
// Each pass sums from zero before it adds to C: shorter sums round less. TRANSPOSED: A lies as [K, R].
// GEGLU: C[R, HALF] = value * gelu(gate), where a panel is HALF columns of the value and the gate's same ones.
template <int R, Kind F>
void micro(const float* a, int64_t lda, const float* b, int64_t k, const Out& to, bool first, bool last) {
    constexpr int V = VECTORS;
    const Out out = to;  // in registers, where a store to C cannot change it
    vec sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) sum[i][j] = first && out.bias ? load(out.bias + j * W) : vec{};
#pragma GCC unroll 4
    for (int64_t x = 0; x < k; x++, a += F == TRANSPOSED ? lda : 1, b += PANEL) {
        vec row[V];
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) row[j] = load(b + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const vec number = broadcast(a[F == TRANSPOSED ? i : i * lda]);
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) sum[i][j] += number * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
        if (F == GEGLU) {
#pragma GCC unroll 16
            for (int j = 0; j < V / 2; j++) store(out.c + i * out.ldc + j * W, sum[i][j] * gelu(sum[i][j + V / 2]));
            continue;
        }
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
            if (!first) sum[i][j] += load(out.c + i * out.ldc + j * W);
            if (last && out.residual) sum[i][j] += load(out.residual + i * out.ldc + j * W);
            store(out.c + i * out.ldc + j * W, sum[i][j]);
        }
    }
}

// `micro` of 1 to R rows.
template <Kind F, int R = ROWS>
inline void some_rows(int rows, const float* a, int64_t lda, const float* b, int64_t k, const Out& to, bool first,
                      bool last) {
    if constexpr (R > 1)
        if (rows < R) return some_rows<F, R - 1>(rows, a, lda, b, k, to, first, last);
    micro<R, F>(a, lda, b, k, to, first, last);
}

// The product of some rows and one panel whose last columns may not be there.
template <Kind F>
void panel(int rows, const float* a, int64_t lda, const float* b, int64_t k, const Out& to, int columns, bool first,
           bool last) {
    constexpr int whole = F == GEGLU ? HALF : PANEL;
    if (columns == whole) return some_rows<F>(rows, a, lda, b, k, to, first, last);
    float part[ROWS][PANEL];
    for (int i = 0; i < rows; i++)
        if (!first) memcpy(part[i], to.c + i * to.ldc, 4 * columns);
    some_rows<F>(rows, a, lda, b, k, {part[0], PANEL, to.bias, nullptr}, first, last);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            to.c[i * to.ldc + j] = part[i][j] + (last && to.residual ? to.residual[i * to.ldc + j] : 0);
}

// Rows of A that stay in L2 while all panels pass: half as many numbers as of B.
inline int64_t rows_at_once(int64_t depth) { return std::max<int64_t>(ROWS, L2 / 2 / depth / ROWS * ROWS); }

// A panel from weights [columns, k] that lie row by row.
inline void pack(float* b, const float* weight, int64_t ldw, int64_t k, int64_t columns) {
    if (columns < PANEL) memset(b, 0, 4 * k * PANEL);
    transpose(weight, ldw, columns, k, b, PANEL);
}

}  // namespace sd
