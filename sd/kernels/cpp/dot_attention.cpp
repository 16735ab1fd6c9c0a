// Attention in bf16: softmax(q k^T / sqrt(size)) v, a chunk of keys at a time, as in FlashAttention (Dao et al. 2022).
//
// Products of bf16 numbers (dot.h); scores, softmax and sums in fp32, exponentials rounded to bf16 for the second product.
// Keys and values go into panels once a head: keys as columns along the size of a head, values along the keys.
//
// How to build and to compare: simd.h.

#include <cmath>

#include "dot.h"
#include "scratch.h"

using namespace sd;

namespace {

#ifdef SD_AMX
constexpr int64_t QUERIES = 64;  // of a task
#else
constexpr int64_t QUERIES = 8 * DOT_ROWS;
#endif
constexpr int64_t KEYS = 8 * COLUMNS;  // of a chunk, at most

struct Attention {
    const uint16_t *q, *k, *v;
    uint16_t* out;  // [batch, queries, heads * size]
    int64_t batch, heads, queries, keys, size;
    int64_t strides[3][3];  // of q, k, v along batch, head, row
    char* panels;           // of each head: its keys, then its values

    int64_t key_panels() const { return ceil_div(keys, COLUMNS); }
    int64_t key_blocks() const { return ceil_div(size, 2 * GROUPS); }  // of a panel of keys
    int64_t value_panels() const { return ceil_div(size, COLUMNS); }
    int64_t value_blocks() const { return ceil_div(keys, 2 * GROUPS); }
    int64_t keys_bytes() const { return key_panels() * key_blocks() * BLOCK_BYTES; }
    int64_t bytes() const { return keys_bytes() + value_panels() * value_blocks() * BLOCK_BYTES; }
};

// Panel p of a head's keys: the pairs of numbers of a key are its groups.
void pack_keys(const Attention& s, const uint16_t* k, int64_t row, int64_t p, char* to) {
    const int64_t groups = s.size / 2;
    memset(to, 0, s.key_blocks() * BLOCK_BYTES);
    for (int64_t c = 0; c < COLUMNS; c += W)
        for (int64_t g = 0; g < groups; g += W) {
            const int64_t count = std::min<int64_t>(W, groups - g);
            vec v[W];  // which are only moved
            for (int i = 0; i < W; i++) {
                const int64_t key = p * COLUMNS + c + i;
                v[i] = vec{};
                if (key < s.keys) memcpy(&v[i], k + key * row + 2 * g, 4 * count);
            }
            transpose(v);
            for (int64_t i = 0; i < count; i++)
                memcpy(to + (g + i) / GROUPS * BLOCK_BYTES + c / W * VECTOR_BYTES + (g + i) % GROUPS * W * 4, &v[i], 4 * W);
        }
}

// Block `block` of all panels of a head's values: the numbers of two keys are groups.
void pack_values(const Attention& s, const uint16_t* v, int64_t row, int64_t block, char* to) {
    for (int64_t p = 0; p < s.value_panels(); p++) {
        char* panel = to + (p * s.value_blocks() + block) * BLOCK_BYTES;
        memset(panel, 0, BLOCK_BYTES);
        for (int64_t key = block * 2 * GROUPS; key < std::min(s.keys, (block + 1) * 2 * GROUPS); key++) {
            const int64_t group = key / 2 % GROUPS;
            for (int64_t c = 0; c < std::min<int64_t>(COLUMNS, s.size - p * COLUMNS); c++)
                memcpy(panel + c / W * VECTOR_BYTES + (group * W + c % W) * 4 + key % 2 * 2, v + key * row + p * COLUMNS + c,
                       2);
        }
    }
}

float highest_of(vec v) {
    float top = v[0];
    for (int i = 1; i < W; i++) top = std::max(top, v[i]);
    return top;
}

// A row's scores of `count` keys, COLUMNS of them each `stride` numbers, to exponentials in bf16, zeros up to `end`.
// Its highest score and total are brought up to date; the result is what earlier sums are to be multiplied by.
float softmax(const float* scores, int64_t stride, int64_t count, int64_t end, float scale, float& highest, float& total,
              uint16_t* out) {
    const auto at = [&](int64_t j) { return scores + j / COLUMNS * stride + j % COLUMNS; };
    const int64_t whole = count / W * W;
    vec tops = broadcast(-1e30f), sums{};
    for (int64_t j = 0; j < whole; j += W) tops = max(tops, load(at(j)));
    float top = highest_of(tops);
    for (int64_t j = whole; j < count; j++) top = std::max(top, *at(j));
    top = std::max(highest, top * scale);
    for (int64_t j = 0; j < end; j += W) {
        vec e = short_exp2(load(at(j)) * scale - top);
        if (j >= whole)
            for (int i = 0; i < W; i++)
                if (j + i >= count) e[i] = 0;
        sums += e;
        store_bf16(out + j, e);
    }
    float sum = 0;
    for (int i = 0; i < W; i++) sum += sums[i];
    const float factor = std::exp2(highest - top);
    highest = top, total = total * factor + sum;
    return factor;
}

// Queries from `first` on, QUERIES or as many as there are, of head h of picture b.
void attend(const Attention& s, int64_t b, int64_t h, int64_t first) {
    const int64_t rows = std::min(QUERIES, s.queries - first), groups = ceil_div(s.size, 2);
    const int64_t q_bytes = s.key_blocks() * 64, out_panels = s.value_panels();
    const float scale = 1.44269504f / std::sqrt(float(s.size));  // and so powers of 2 in place of e
    // Sums of the result, scores of a chunk, then queries and exponentials in bf16.
    float* sums = own_scratch.get(QUERIES * (out_panels * COLUMNS + KEYS + q_bytes / 4 + KEYS / 2));
    float* scores = sums + QUERIES * out_panels * COLUMNS;
    char* q = reinterpret_cast<char*>(scores + QUERIES * KEYS);
    uint16_t* exponentials = reinterpret_cast<uint16_t*>(q + QUERIES * q_bytes);
    const char *q_rows[QUERIES], *e_rows[QUERIES];
    float highest[QUERIES], total[QUERIES] = {};
    const uint16_t* from = s.q + b * s.strides[0][0] + h * s.strides[0][1] + first * s.strides[0][2];
    memset(q, 0, QUERIES * q_bytes);
    for (int64_t i = 0; i < QUERIES; i++) {
        if (i < rows) memcpy(q + i * q_bytes, from + i * s.strides[0][2], 2 * s.size);
        q_rows[i] = q + i * q_bytes;
        e_rows[i] = reinterpret_cast<char*>(exponentials + i * KEYS);
        highest[i] = -1e30f;
    }
    const char *keys = s.panels + (b * s.heads + h) * s.bytes(), *values = keys + s.keys_bytes();
    for (int64_t start = 0; start < s.keys; start += KEYS) {
        const int64_t count = std::min(KEYS, s.keys - start), end = ceil_div(count, 2 * GROUPS) * 2 * GROUPS;
        const Taps along_size = {1, groups, {0}, {0}}, along_keys = {1, ceil_div(count, 2), {0}, {0}};
        for (int64_t p = 0; p < ceil_div(count, COLUMNS); p++) {
            const int vectors = std::min<int64_t>(DOT_VECTORS, ceil_div(count - p * COLUMNS, W));
            for (int64_t i = 0; i < rows; i += DOT_ROWS)
                some_dots<Bf16>(std::min<int64_t>(DOT_ROWS, rows - i), vectors, q_rows + i, along_size,
                                keys + (start / COLUMNS + p) * s.key_blocks() * BLOCK_BYTES,
                                scores + (p * QUERIES + i) * COLUMNS, true);
        }
        for (int64_t i = 0; i < rows; i++) {
            const float factor = softmax(scores + i * COLUMNS, QUERIES * COLUMNS, count, end, scale, highest[i], total[i],
                                         exponentials + i * KEYS);
            if (start == 0 || factor == 1) continue;
            for (int64_t p = 0; p < out_panels; p++)
                for (int64_t j = 0; j < COLUMNS; j += W) {
                    float* sum = sums + (p * QUERIES + i) * COLUMNS + j;
                    store(sum, load(sum) * factor);
                }
        }
        for (int64_t p = 0; p < out_panels; p++) {
            const int vectors = std::min<int64_t>(DOT_VECTORS, ceil_div(s.size - p * COLUMNS, W));
            for (int64_t i = 0; i < rows; i += DOT_ROWS)
                some_dots<Bf16>(std::min<int64_t>(DOT_ROWS, rows - i), vectors, e_rows + i, along_keys,
                                values + (p * s.value_blocks() + start / (2 * GROUPS)) * BLOCK_BYTES,
                                sums + (p * QUERIES + i) * COLUMNS, start == 0);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        uint16_t* to = s.out + ((b * s.queries + first + i) * s.heads + h) * s.size;
        for (int64_t d = 0; d < s.size; d += W) {
            const int64_t count = std::min<int64_t>(W, s.size - d);
            uint16_t part[W];
            const float* sum = sums + (d / COLUMNS * QUERIES + i) * COLUMNS + d % COLUMNS;
            store_bf16(count == W ? to + d : part, load(sum) / total[i]);
            if (count < W) memcpy(to + d, part, 2 * count);
        }
    }
}

}  // namespace

// q [batch, heads, queries, size], k and v [batch, heads, keys, size] -> out [batch, queries, heads * size], all bf16;
// size is even. strides [3, 3] of q, k and v along batch, head and row count numbers; a head's numbers lie side by side.
EXPORT void sd_dot_attention(const void* q, const void* k, const void* v, void* out, int64_t batch, int64_t heads,
                             int64_t queries, int64_t keys, int64_t size, const int64_t* strides, int threads) {
    Attention s = {static_cast<const uint16_t*>(q), static_cast<const uint16_t*>(k), static_cast<const uint16_t*>(v),
                   static_cast<uint16_t*>(out), batch, heads, queries, keys, size, {}, nullptr};
    memcpy(s.strides, strides, sizeof s.strides);
    s.panels = reinterpret_cast<char*>(shared_scratch.get(batch * heads * s.bytes() / 4));
    const int64_t tasks = ceil_div(queries, QUERIES), of_keys = s.key_panels(), of_values = s.value_blocks();
#pragma omp parallel num_threads(threads)
    {
        const TilesInUse tiles;
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < batch * heads; i++)
            for (int64_t j = 0; j < of_keys + of_values; j++) {
                const int64_t b = i / heads, h = i % heads;
                char* to = s.panels + i * s.bytes();
                if (j < of_keys)
                    pack_keys(s, s.k + b * s.strides[1][0] + h * s.strides[1][1], s.strides[1][2], j,
                              to + j * s.key_blocks() * BLOCK_BYTES);
                else
                    pack_values(s, s.v + b * s.strides[2][0] + h * s.strides[2][1], s.strides[2][2], j - of_keys,
                                to + s.keys_bytes());
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < batch * heads; i++)
            for (int64_t j = 0; j < tasks; j++) attend(s, i / heads, i % heads, j * QUERIES);
        (void)tiles;
    }
}
