// Linear layers, GEGLU within one, and 3x3 convolutions as products of patches, in fp32.
//
//     sd_linear   x weight^T + bias + residual
//     sd_geglu    value * gelu(gate), both halves of x weight^T + bias, without the halves ever in memory
//     sd_patches  what makes a convolution a linear layer
//
// Weights are read as a checkpoint has them and packed into panels (product.h) by each call: a share of 1 / rows.
// How to build and to compare: simd.h.

#include "product.h"
#include "scratch.h"

using namespace sd;

namespace {

// Columns n0 to n1 of out = x weight^T + bias, rows m0 to m1.
template <Kind F>
void linear_block(const float* x, int64_t ldx, const float* weight, const float* bias, const float* residual,
                  float* out, int64_t m0, int64_t m1, int64_t k, int64_t n, int64_t n0, int64_t n1, int64_t kc,
                  float* packed) {
    constexpr int step = F == GEGLU ? HALF : PANEL;
    float biases[PANEL];
    for (int64_t k0 = 0; k0 < k; k0 += kc) {
        const int64_t depth = std::min(kc, k - k0);
        for (int64_t j = n0; j < n1; j += step) {
            float* b = packed + (j - n0) / step * depth * PANEL;
            const int columns = std::min<int64_t>(step, n1 - j);
            if (F == PLAIN) {
                pack(b, weight + j * k + k0, k, depth, columns);
            } else {
                transpose(weight + j * k + k0, k, HALF, depth, b, PANEL);
                transpose(weight + (n + j) * k + k0, k, HALF, depth, b + HALF, PANEL);
            }
        }
        const int64_t many = rows_at_once(depth);
        for (int64_t i0 = m0; i0 < m1; i0 += many)
            for (int64_t j = n0; j < n1; j += step) {
                const int columns = std::min<int64_t>(step, n1 - j);
                memset(biases, 0, sizeof biases);
                if (bias) memcpy(biases, bias + j, 4 * columns);
                if (bias && F == GEGLU) memcpy(biases + HALF, bias + n + j, 4 * columns);
                const float* b = packed + (j - n0) / step * depth * PANEL;
                for (int64_t i = i0; i < std::min(m1, i0 + many); i += ROWS) {
                    const Out to = {out + i * n + j, n, biases, residual ? residual + i * n + j : nullptr};
                    panel<F>(std::min<int64_t>(ROWS, m1 - i), x + i * ldx + k0, ldx, b, depth, to, columns, k0 == 0,
                             k0 + depth == k);
                }
            }
    }
}

template <Kind F>
void linear(const float* x, int64_t ldx, const float* weight, const float* bias, const float* residual, float* out,
            int64_t m, int64_t k, int64_t n, int threads) {
    constexpr int step = F == GEGLU ? HALF : PANEL;
    constexpr int64_t most = 128 * ROWS;  // rows of a task: each packs its own columns, which pays from some hundred on
    const int64_t kc = ceil_div(k, F == GEGLU ? 1 : ceil_div(k, DEPTH));
    const int64_t parts = ceil_div(m, most), per = ceil_div(ceil_div(m, parts), ROWS) * ROWS;
    int64_t nc = std::max<int64_t>(1, L2 / (kc * PANEL));
    while (nc > 1 && ceil_div(n, nc * step) * parts < 4 * threads) nc--;
    const int64_t chunks = ceil_div(n, nc * step);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t m0 = part * per, m1 = std::min(m, m0 + per);
            const int64_t n0 = chunk * nc * step, n1 = std::min(n, n0 + nc * step);
            if (m0 < m1)
                linear_block<F>(x, ldx, weight, bias, residual, out, m0, m1, k, n, n0, n1, kc,
                                own_scratch.get(nc * kc * PANEL));
        }
}

}  // namespace

// out [m, n] = x [m, k] weight [n, k]^T + bias [n] + residual [m, n]; rows of x are ldx apart; bias and residual may be
// null.
EXPORT void sd_linear(const float* x, int64_t ldx, const float* weight, const float* bias, const float* residual,
                      float* out, int64_t m, int64_t k, int64_t n, int threads) {
    linear<PLAIN>(x, ldx, weight, bias, residual, out, m, k, n, threads);
}

// out [m, n] = value * gelu(gate), both halves of x [m, k] weight [2 n, k]^T + bias [2 n]; n is a multiple of HALF.
EXPORT void sd_geglu(const float* x, int64_t ldx, const float* weight, const float* bias, float* out, int64_t m,
                     int64_t k, int64_t n, int threads) {
    linear<GEGLU>(x, ldx, weight, bias, nullptr, out, m, k, n, threads);
}

// The 3x3 patches around every stride-th position of x [batch, height, width, channels], zeros beyond its edges:
// [batch, height / stride, width / stride, channels * 9], rounded up, as weights [c_out, channels, 3, 3] take them.
EXPORT void sd_patches(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t stride,
                       float* out, int threads) {
    const int64_t down = ceil_div(height, stride), across = ceil_div(width, stride);
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < down; i++)
            for (int64_t j = 0; j < across; j++) {
                float* to = out + ((b * down + i) * across + j) * channels * 9;
                for (int64_t tap = 0; tap < 9; tap++) {
                    const int64_t y = i * stride + tap / 3 - 1, z = j * stride + tap % 3 - 1;
                    const bool inside = y >= 0 && y < height && z >= 0 && z < width;
                    const float* from = x + ((b * height + y) * width + z) * channels;
                    for (int64_t c = 0; c < channels; c++) to[c * 9 + tap] = inside ? from[c] : 0;
                }
            }
}
