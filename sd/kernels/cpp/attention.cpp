// Attention in fp32: softmax(q k^T / sqrt(size)) v, a chunk of keys at a time, as in FlashAttention (Dao et al. 2022).
//
// Some queries of a head against all its keys. Everything is transposed, a vector being the same number of W queries:
// then keys and values are read as they lie, no column is left empty whatever the size of a head, and the softmax needs
// no sum within a vector.
//
// How to build and to compare: simd.h.

#include <cmath>

#include "product.h"
#include "scratch.h"

using namespace sd;

namespace {

constexpr int64_t QUERIES = 8 * PANEL;  // of a task

struct Attention {
    const float *q, *k, *v;
    float* out;  // [batch, queries, heads * size]
    int64_t batch, heads, queries, keys, size;
    int64_t strides[3][3];  // of q, k, v along batch, head, row
};

// Scores [keys, PANEL] to exponentials, and the sums so far [size, PANEL] to what the highest score now makes of them.
void softmax(float* scores, int64_t keys, float* highest, float* total, float* sums, int64_t size) {
    constexpr int V = PANEL / W;
    vec top[V], factor[V], sum[V] = {};
    for (int v = 0; v < V; v++) top[v] = load(highest + v * W);
    for (int64_t j = 0; j < keys * PANEL; j += PANEL)
        for (int v = 0; v < V; v++) top[v] = max(top[v], load(scores + j + v * W));
    for (int v = 0; v < V; v++) factor[v] = exp2(load(highest + v * W) - top[v]);
    for (int64_t j = 0; j < keys * PANEL; j += PANEL)
        for (int v = 0; v < V; v++) {
            const vec e = exp2(load(scores + j + v * W) - top[v]);
            sum[v] += e;
            store(scores + j + v * W, e);
        }
    for (int v = 0; v < V; v++) {
        store(highest + v * W, top[v]);
        store(total + v * W, load(total + v * W) * factor[v] + sum[v]);
        for (int64_t d = 0; d < size; d++) store(sums + d * PANEL + v * W, load(sums + d * PANEL + v * W) * factor[v]);
    }
}

// QUERIES queries from `first` on, or as many as there are, of head h of picture b.
void attend(const Attention& s, int64_t b, int64_t h, int64_t first, int64_t chunk) {
    const int64_t rows = std::min(QUERIES, s.queries - first), panels = ceil_div(rows, PANEL);
    const int64_t one = s.size * PANEL;
    float* q = own_scratch.get(2 * panels * one + chunk * PANEL);
    float *sums = q + panels * one, *scores = sums + panels * one;
    float highest[QUERIES], total[QUERIES] = {};
    const float scale = 1.44269504f / std::sqrt(float(s.size));  // and so powers of 2 in place of e
    const int64_t q_row = s.strides[0][2], k_row = s.strides[1][2], v_row = s.strides[2][2];
    const float* from = s.q + b * s.strides[0][0] + h * s.strides[0][1] + first * q_row;
    memset(q, 0, 8 * panels * one);  // and the sums, which follow
    for (int64_t p = 0; p < panels; p++)
        transpose(from + p * PANEL * q_row, q_row, std::min<int64_t>(PANEL, rows - p * PANEL), s.size, q + p * one, PANEL,
                  scale);
    std::fill(highest, highest + QUERIES, -1e30f);
    for (int64_t start = 0; start < s.keys; start += chunk) {
        const int64_t count = std::min(chunk, s.keys - start);
        const float* k = s.k + b * s.strides[1][0] + h * s.strides[1][1] + start * k_row;
        const float* v = s.v + b * s.strides[2][0] + h * s.strides[2][1] + start * v_row;
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t j = 0; j < count; j += ROWS)
                some_rows<PLAIN>(std::min<int64_t>(ROWS, count - j), k + j * k_row, k_row, q + p * one, s.size,
                                 {scores + j * PANEL, PANEL, nullptr, nullptr}, true, false);
            softmax(scores, count, highest + p * PANEL, total + p * PANEL, sums + p * one, s.size);
            for (int64_t d = 0; d < s.size; d += ROWS)
                some_rows<TRANSPOSED>(std::min<int64_t>(ROWS, s.size - d), v + d, v_row, scores, count,
                                      {sums + p * one + d * PANEL, PANEL, nullptr, nullptr}, false, false);
        }
    }
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t d = 0; d < s.size; d++)
            for (int64_t i = 0; i < PANEL; i += W) {
                float* sum = sums + p * one + d * PANEL + i;
                store(sum, load(sum) / load(total + p * PANEL + i));
            }
        float* to = s.out + ((b * s.queries + first + p * PANEL) * s.heads + h) * s.size;
        transpose(sums + p * one, PANEL, s.size, std::min<int64_t>(PANEL, rows - p * PANEL), to, s.heads * s.size);
    }
}

}  // namespace

// q [batch, heads, queries, size], k and v [batch, heads, keys, size] -> out [batch, queries, heads * size].
// strides [3, 3] of q, k and v along batch, head and row count numbers; a head's numbers lie side by side.
EXPORT void sd_attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t heads,
                         int64_t queries, int64_t keys, int64_t size, const int64_t* strides, int threads) {
    Attention s = {q, k, v, out, batch, heads, queries, keys, size, {}};
    memcpy(s.strides, strides, sizeof s.strides);
    const int64_t chunk = std::max<int64_t>(64, std::min<int64_t>(256, 20480 / size));
    const int64_t blocks = ceil_div(queries, QUERIES);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < batch * heads; i++)
        for (int64_t block = 0; block < blocks; block++)
            attend(s, i / heads, i % heads, block * QUERIES, std::min(chunk, keys));
}
