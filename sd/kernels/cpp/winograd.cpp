// 3x3 convolutions by Winograd's F(2x2,3x3) and F(4x4,3x3) (Lavin and Gray 2016), in fp32.
//
//     sd_winograd_kernel  the kernel's transform, once a model
//     sd_winograd         patches transformed, a product for each of their numbers, products transformed back
//
// x may be upsampled by two on the way, which repeats rows and columns: a b b c c d in a patch. Number 2 of the patch's
// transform is then 0 (F(2x2): d2 - d1; F(4x4): d4 - 4 d2 - d3 + 4 d1) and left out, as are its row and column: 25
// products are left of 36, 9 of 16.
//
// How to build and to compare: simd.h.

#include "product.h"
#include "scratch.h"

using namespace sd;

namespace {

// d -> B^T d and p -> A^T p, in one dimension.
template <int M>
struct Transform;

template <>
struct Transform<2> {
    static void input(vec d[4]) {
        const vec a = d[0] - d[2], b = d[1] + d[2], c = d[2] - d[1], e = d[1] - d[3];
        d[0] = a, d[1] = b, d[2] = c, d[3] = e;
    }
    static void output(const vec p[4], vec y[2]) { y[0] = p[0] + p[1] + p[2], y[1] = p[1] - p[2] - p[3]; }
};

template <>
struct Transform<4> {
    static void input(vec d[6]) {
        const vec even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
        const vec even2 = d[4] - d[2], odd2 = 2.0f * (d[3] - d[1]);
        const vec first = 4.0f * d[0] - 5.0f * d[2] + d[4], last = 4.0f * d[1] - 5.0f * d[3] + d[5];
        d[0] = first, d[1] = even + odd, d[2] = even - odd, d[3] = even2 + odd2, d[4] = even2 - odd2, d[5] = last;
    }
    static void output(const vec p[6], vec y[4]) {
        const vec sum = p[1] + p[2], difference = p[1] - p[2], sum2 = p[3] + p[4], difference2 = p[3] - p[4];
        y[0] = p[0] + sum + sum2, y[1] = difference + 2.0f * difference2;
        y[2] = sum + 4.0f * sum2, y[3] = difference + 8.0f * difference2 + p[5];
    }
};

struct Conv {
    const float* x;
    int64_t batch, height, width, c_in;  // height and width of the output: x has half of them if it is upsampled
    int upsampled;
    const float* kernel;  // [active numbers of a patch, panels, c_in, PANEL]
    int64_t c_out;
    const float* bias;  // [batch or 1, c_out]
    int64_t bias_stride;
    const float* residual;
    float* out;
};

// The patch of tile t, transformed: number i of each channel goes to v + i * stride.
template <int M>
void transform_patch(const Conv& s, int64_t t, float* v, int64_t stride) {
    constexpr int N = M + 2;
    const int64_t across = ceil_div(s.width, M), down = ceil_div(s.height, M);
    const int64_t top = t / across % down * M - 1, left = t % across * M - 1, b = t / across / down;
    const int64_t h = s.height >> s.upsampled, w = s.width >> s.upsampled;
    const float* from[N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            const int64_t y = top + i, x = left + j;
            const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
            from[i][j] = inside ? s.x + ((b * h + (y >> s.upsampled)) * w + (x >> s.upsampled)) * s.c_in : nullptr;
        }
    for (int64_t c = 0; c < s.c_in; c += W) {
        vec d[N][N], column[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) column[i] = from[i][j] ? load(from[i][j] + c) : vec{};
            Transform<M>::input(column);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) d[i][j] = column[i];
        }
        float* to = v + c;
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            Transform<M>::input(d[i]);
            if (s.upsampled && i == 2) continue;  // zero
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                if (s.upsampled && j == 2) continue;
                store(to, d[i][j]);
                to += stride;
            }
        }
    }
}

// The products p of tile t back to M x M positions of the output.
template <int M>
void transform_products(const Conv& s, int64_t t, const float* p, int64_t stride) {
    constexpr int N = M + 2;
    const int64_t across = ceil_div(s.width, M), down = ceil_div(s.height, M);
    const int64_t top = t / across % down * M, left = t % across * M, b = t / across / down;
    const int64_t rows = std::min<int64_t>(M, s.height - top), columns = std::min<int64_t>(M, s.width - left);
    for (int64_t c = 0; c < s.c_out; c += W) {
        vec y[M][N];
        const int64_t channels = std::min<int64_t>(W, s.c_out - c);
        const vec bias = s.bias ? load(s.bias + b * s.bias_stride + c, channels) : vec{};
        const float* number = p + c;
        vec d[N][N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                d[i][j] = vec{};
                if (s.upsampled && (i == 2 || j == 2)) continue;
                d[i][j] = load(number);
                number += stride;
            }
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            vec column[N], short_column[M];
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) column[i] = d[i][j];
            Transform<M>::output(column, short_column);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) y[i][j] = short_column[i];
        }
        for (int i = 0; i < rows; i++) {
            vec row[M];
            Transform<M>::output(y[i], row);
            for (int j = 0; j < columns; j++) {
                const int64_t at = ((b * s.height + top + i) * s.width + left + j) * s.c_out + c;
                const vec value = row[j] + bias;
                store(s.out + at, s.residual ? value + load(s.residual + at, channels) : value, channels);
            }
        }
    }
}

// products = patches kernel, for one number of the patch, all tiles of a block and some panels.
void multiply(const Conv& s, const float* patches, const float* kernel, float* products, int64_t columns, int64_t tiles,
              int64_t first, int64_t end, int64_t kc) {
    for (int64_t k0 = 0; k0 < s.c_in; k0 += kc) {
        const int64_t depth = std::min(kc, s.c_in - k0), many = rows_at_once(depth);
        for (int64_t t0 = 0; t0 < tiles; t0 += many)
            for (int64_t p = first; p < end; p++)
                for (int64_t t = t0; t < std::min(tiles, t0 + many); t += ROWS)
                    some_rows<PLAIN>(std::min<int64_t>(ROWS, tiles - t), patches + t * s.c_in + k0, s.c_in,
                                     kernel + (p * s.c_in + k0) * PANEL, depth,
                                     {products + t * columns + p * PANEL, columns, nullptr, nullptr}, k0 == 0, false);
    }
}

template <int M>
void winograd(const Conv& s, int threads) {
    constexpr int N = M + 2;
    const int64_t numbers = s.upsampled ? (N - 1) * (N - 1) : N * N;
    const int64_t panels = ceil_div(s.c_out, PANEL), columns = panels * PANEL;
    const int64_t tiles = s.batch * ceil_div(s.height, M) * ceil_div(s.width, M);
    // Each block of tiles reads the whole kernel: a few large ones, of 64 MB of patches and products.
    const int64_t fit = (16 << 20) / (numbers * (s.c_in + columns));
    const int64_t block = std::min(tiles, std::max<int64_t>(8 * ROWS, fit / ROWS * ROWS));
    const int64_t kc = ceil_div(s.c_in, ceil_div(s.c_in, DEPTH));
    const int64_t nc = std::max<int64_t>(1, std::min(panels, L2 / (kc * PANEL)));
    const int64_t chunks = ceil_div(panels, nc);
    float* patches = shared_scratch.get(numbers * block * (s.c_in + columns));
    float* products = patches + numbers * block * s.c_in;
#pragma omp parallel num_threads(threads)
    for (int64_t start = 0; start < tiles; start += block) {
        const int64_t count = std::min(block, tiles - start);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++)
            transform_patch<M>(s, start + t, patches + t * s.c_in, block * s.c_in);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t number = 0; number < numbers; number++)
            for (int64_t chunk = 0; chunk < chunks; chunk++)
                multiply(s, patches + number * block * s.c_in, s.kernel + number * panels * s.c_in * PANEL,
                         products + number * block * columns, columns, count, chunk * nc,
                         std::min(panels, (chunk + 1) * nc), kc);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++)
            transform_products<M>(s, start + t, products + t * columns, block * columns);
    }
}

// G g G^T of weight [c_out, c_in, 3, 3], any strides, in panels: numbers with row or column `left_out` are not kept.
void transform_kernel(const float* weight, const int64_t* strides, int64_t c_in, int64_t c_out, int n, const double* g,
                      int left_out, float* kernel, int threads) {
    const int64_t panels = ceil_div(c_out, PANEL), stride = panels * c_in * PANEL;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < c_in; c++) {
            double w[3][3][PANEL] = {}, rows[6][3][PANEL];  // a panel of output channels at once
            for (int64_t o = 0; o < std::min<int64_t>(PANEL, c_out - p * PANEL); o++)
                for (int i = 0; i < 9; i++)
                    w[i / 3][i % 3][o] = weight[(p * PANEL + o) * strides[0] + c * strides[1] + i / 3 * strides[2] +
                                                i % 3 * strides[3]];
            for (int i = 0; i < n; i++)
                for (int b = 0; b < 3; b++)
                    for (int o = 0; o < PANEL; o++)
                        rows[i][b][o] = g[i * 3] * w[0][b][o] + g[i * 3 + 1] * w[1][b][o] + g[i * 3 + 2] * w[2][b][o];
            float* to = kernel + (p * c_in + c) * PANEL;
            for (int i = 0; i < n; i++)
                for (int j = 0; j < n; j++) {
                    if (i == left_out || j == left_out) continue;
                    for (int o = 0; o < PANEL; o++)
                        to[o] = rows[i][0][o] * g[j * 3] + rows[i][1][o] * g[j * 3 + 1] + rows[i][2][o] * g[j * 3 + 2];
                    to += stride;
                }
        }
}

}  // namespace

// out [batch, height, width, c_out] = x [batch, height, width, c_in] * kernel + bias + residual, shaped as out; x has
// half the height and width if it is upsampled. kernel from sd_winograd_kernel; bias [c_out] a picture, bias_stride apart;
// m is 2 or 4; c_in is a multiple of W; bias and residual may be null.
EXPORT void sd_winograd(const float* x, int64_t batch, int64_t height, int64_t width, int64_t c_in, int upsampled,
                        const float* kernel, int64_t c_out, const float* bias, int64_t bias_stride,
                        const float* residual, float* out, int m, int threads) {
    const Conv s = {x, batch, height, width, c_in, upsampled, kernel, c_out, bias, bias_stride, residual, out};
    m == 4 ? winograd<4>(s, threads) : winograd<2>(s, threads);
}

// kernel [(n or n - 1)^2, panels, c_in, PANEL] from weight [c_out, c_in, 3, 3], of any strides [4], and G [n, 3];
// left_out is 2 or -1.
EXPORT void sd_winograd_kernel(const float* weight, const int64_t* strides, int64_t c_in, int64_t c_out, int n,
                               const double* g, int left_out, float* kernel, int threads) {
    transform_kernel(weight, strides, c_in, c_out, n, g, left_out, kernel, threads);
}
