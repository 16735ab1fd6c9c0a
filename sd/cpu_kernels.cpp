// The arithmetic of a Stable Diffusion step on CPUs, in fp32; sd/cpu_kernels.py compiles, loads and calls it.
//
// Everything rests on one small loop, `micro`: R x 16 numbers of a matrix product that stay in registers. Six rows
// by two vectors fill AVX2's sixteen registers: twelve sums, two vectors of B, one number of A. B comes in panels: all of
// K, 16 columns at a time, side by side in memory. A is read where it lies.
// Vectors are GCC's (clang has them too), so nothing here names an instruction set; -march=native picks it.
// Activations have their channels innermost: [batch, height, width, channels].

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int W = 8;       // numbers in a vector
constexpr int PANEL = 16;  // columns in a panel of B
constexpr int64_t DEPTH = 1280;    // most numbers that are summed up at once; a panel of them comes from L2
constexpr int64_t L2 = 64 * 1024;  // numbers of B that a thread works on at a time: 256 KB

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef vec loose __attribute__((aligned(4), may_alias));  // in memory, at any address

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
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
inline vec all(float x) { return vec{x, x, x, x, x, x, x, x}; }
inline vec larger(vec a, vec b) {
#ifdef __AVX__
    return __builtin_ia32_maxps256(a, b);  // what gcc makes of the other line waits for a comparison
#else
    return a > b ? a : b;
#endif
}

// 2^x, relative error 2e-7; 2^-126 below that.
inline vec exp2(vec x) {
    x = larger(x, all(-126.0f));
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

inline vec exp(vec x) {
    return exp2(-larger(-x * 1.44269504f, all(-126.0f)));
}

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
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

// Eight vectors of eight, rows to columns.
inline void turn(vec v[W]) {
    vec pairs[W], fours[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 2) {
        pairs[i] = SHUFFLED(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = SHUFFLED(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 4)
#pragma GCC unroll 8
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = SHUFFLED(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = SHUFFLED(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        v[i] = SHUFFLED(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = SHUFFLED(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// to[column][row] = from[row][column] * factor.
inline void turn(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to, int64_t ld_to,
                 float factor = 1) {
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < columns; j += W) {
            const float* block = from + i * ld_from + j;
            float* turned = to + j * ld_to + i;
            if (rows - i < W || columns - j < W) {
                for (int64_t c = 0; c < std::min<int64_t>(W, columns - j); c++)
                    for (int64_t r = 0; r < std::min<int64_t>(W, rows - i); r++)
                        turned[c * ld_to + r] = block[r * ld_from + c] * factor;
                continue;
            }
            vec v[W];
#pragma GCC unroll 8
            for (int r = 0; r < W; r++) v[r] = load(block + r * ld_from) * factor;
            turn(v);
#pragma GCC unroll 8
            for (int c = 0; c < W; c++) store(turned + c * ld_to, v[c]);
        }
}

// ---- memory of a thread's own, which stays for the next call

struct Scratch {
    float* data = nullptr;
    int64_t bytes = 0;
    float* get(int64_t numbers) {
        if (4 * numbers > bytes) {
            if (data) munmap(data, bytes);
            bytes = (4 * numbers + (1 << 21) - 1) >> 21 << 21;
            data = static_cast<float*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            madvise(data, bytes, MADV_HUGEPAGE);  // 36 streams a large stride apart would miss the TLB in small pages
        }
        return data;
    }
    ~Scratch() {
        if (data) munmap(data, bytes);
    }
};

thread_local Scratch shared_scratch, own_scratch;  // of the calling thread for all; of each thread for itself

// ---- matrix products

enum Kind { PLAIN, TURNED, GEGLU };

struct Out {
    float* c;
    int64_t ldc;
    const float* bias;      // of these columns, or null
    const float* residual;  // as c lies, or null
};

// C[R, PANEL] (+)= A[R, K] B[K, PANEL]; the first pass starts from the bias, the last adds the residual.
// Each pass sums from zero before it adds to C: shorter sums round less. TURNED: A lies as [K, R].
template <int R, Kind F>
void micro(const float* a, int64_t lda, const float* b, int64_t k, Out out, bool first, bool last) {
    constexpr int V = PANEL / W;
    vec sum[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int j = 0; j < V; j++)
            sum[i][j] = first && out.bias ? load(out.bias + j * W) : vec{};
#pragma GCC unroll 4
    for (int64_t x = 0; x < k; x++, a += F == TURNED ? lda : 1, b += PANEL) {
        vec row[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) row[j] = load(b + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const vec number = all(a[F == TURNED ? i : i * lda]);
#pragma GCC unroll 8
            for (int j = 0; j < V; j++) sum[i][j] += number * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
        if (F == GEGLU) {  // a panel is 8 columns of the value and the gate's same 8
            store(out.c + i * out.ldc, sum[i][0] * gelu(sum[i][V - 1]));
            continue;
        }
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) {
            if (!first) sum[i][j] += load(out.c + i * out.ldc + j * W);
            if (last && out.residual) sum[i][j] += load(out.residual + i * out.ldc + j * W);
            store(out.c + i * out.ldc + j * W, sum[i][j]);
        }
    }
}

template <Kind F>
void some_rows(int rows, const float* a, int64_t lda, const float* b, int64_t k, Out out, bool first, bool last) {
    switch (rows) {
        case 1: return micro<1, F>(a, lda, b, k, out, first, last);
        case 2: return micro<2, F>(a, lda, b, k, out, first, last);
        case 3: return micro<3, F>(a, lda, b, k, out, first, last);
        case 4: return micro<4, F>(a, lda, b, k, out, first, last);
        case 5: return micro<5, F>(a, lda, b, k, out, first, last);
        default: return micro<6, F>(a, lda, b, k, out, first, last);
    }
}

// The product of some rows and one panel whose last columns may not be there.
template <Kind F>
void panel(int rows, const float* a, int64_t lda, const float* b, int64_t k, Out out, int columns, bool first, bool last) {
    constexpr int whole = F == GEGLU ? W : PANEL;
    if (columns == whole) return some_rows<F>(rows, a, lda, b, k, out, first, last);
    float part[6][PANEL];
    for (int i = 0; i < rows; i++)
        if (!first) memcpy(part[i], out.c + i * out.ldc, 4 * columns);
    some_rows<F>(rows, a, lda, b, k, {part[0], PANEL, out.bias, nullptr}, first, last);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            out.c[i * out.ldc + j] = part[i][j] + (last && out.residual ? out.residual[i * out.ldc + j] : 0);
}

// Rows of A that stay in L2 while all panels pass: half as many numbers as of B.
inline int64_t rows_at_once(int64_t depth) { return std::max<int64_t>(6, L2 / 2 / depth / 6 * 6); }

// A panel from weights [columns, k] that lie row by row.
void pack(float* b, const float* weight, int64_t ldw, int64_t k, int64_t columns) {
    if (columns < PANEL) memset(b, 0, 4 * k * PANEL);
    turn(weight, ldw, columns, k, b, PANEL);
}

// Columns n0.. of out = x weight^T + bias, all rows from m0 to m1.
template <Kind F>
void linear_block(const float* x, int64_t ldx, const float* weight, const float* bias, const float* residual, float* out,
                  int64_t m0, int64_t m1, int64_t k, int64_t n, int64_t n0, int64_t n1, int64_t kc, float* packed) {
    constexpr int step = F == GEGLU ? W : PANEL;
    float biases[PANEL];
    for (int64_t k0 = 0; k0 < k; k0 += kc) {
        const int64_t depth = std::min(kc, k - k0);
        for (int64_t j = n0; j < n1; j += step) {
            float* b = packed + (j - n0) / step * depth * PANEL;
            const int columns = std::min<int64_t>(step, n1 - j);
            if (F == PLAIN) {
                pack(b, weight + j * k + k0, k, depth, columns);
            } else {
                turn(weight + j * k + k0, k, W, depth, b, PANEL);
                turn(weight + (n + j) * k + k0, k, W, depth, b + W, PANEL);
            }
        }
        for (int64_t i0 = m0; i0 < m1; i0 += rows_at_once(depth))
            for (int64_t j = n0; j < n1; j += step) {
                const int columns = std::min<int64_t>(step, n1 - j);
                memset(biases, 0, sizeof biases);
                if (bias) memcpy(biases, bias + j, 4 * columns);
                if (bias && F == GEGLU) memcpy(biases + W, bias + n + j, 4 * columns);
                const float* b = packed + (j - n0) / step * depth * PANEL;
                for (int64_t i = i0; i < std::min(m1, i0 + rows_at_once(depth)); i += 6) {
                    const Out to = {out + i * n + j, n, biases, residual ? residual + i * n + j : nullptr};
                    panel<F>(std::min<int64_t>(6, m1 - i), x + i * ldx + k0, ldx, b, depth, to, columns, k0 == 0,
                             k0 + depth == k);
                }
            }
    }
}

template <Kind F>
void linear(const float* x, int64_t ldx, const float* weight, const float* bias, const float* residual, float* out,
            int64_t m, int64_t k, int64_t n, int threads) {
    constexpr int step = F == GEGLU ? W : PANEL;
    const int64_t splits = F == GEGLU ? 1 : (k + DEPTH - 1) / DEPTH;
    const int64_t kc = (k + splits - 1) / splits;
    // Each task packs its own columns, which pays from some hundred rows on.
    int64_t nc = std::max<int64_t>(1, L2 / (kc * PANEL));
    while (nc > 1 && ((n + nc * step - 1) / (nc * step)) * ((m + 767) / 768) < 4 * threads) nc--;
    const int64_t chunks = (n + nc * step - 1) / (nc * step);
    const int64_t parts = (m + 767) / 768, per = ((m + parts - 1) / parts + 5) / 6 * 6;
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

// ---- Winograd

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
    const int64_t across = (s.width + M - 1) / M, down = (s.height + M - 1) / M;
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
            if (s.upsampled && i == 2) continue;  // zero, see sd/winograd.py
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
    const int64_t across = (s.width + M - 1) / M, down = (s.height + M - 1) / M;
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
                for (int64_t t = t0; t < std::min(tiles, t0 + many); t += 6)
                    some_rows<PLAIN>(std::min<int64_t>(6, tiles - t), patches + t * s.c_in + k0, s.c_in,
                                        kernel + (p * s.c_in + k0) * PANEL, depth,
                                        {products + t * columns + p * PANEL, columns, nullptr, nullptr}, k0 == 0, false);
    }
}

template <int M>
void winograd(const Conv& s, int threads) {
    constexpr int N = M + 2;
    const int64_t numbers = s.upsampled ? (N - 1) * (N - 1) : N * N;
    const int64_t panels = (s.c_out + PANEL - 1) / PANEL, columns = panels * PANEL;
    const int64_t tiles = s.batch * ((s.height + M - 1) / M) * ((s.width + M - 1) / M);
    // Each block of tiles reads the whole kernel: a few large ones, of 64 MB of patches and products.
    const int64_t fit = (16 << 20) / (numbers * (s.c_in + columns));
    const int64_t block = std::min(tiles, std::max<int64_t>(48, fit / 6 * 6));
    const int64_t splits = (s.c_in + DEPTH - 1) / DEPTH, kc = (s.c_in + splits - 1) / splits;
    const int64_t nc = std::max<int64_t>(1, std::min(panels, L2 / (kc * PANEL)));
    const int64_t chunks = (panels + nc - 1) / nc;
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
    const int64_t panels = (c_out + PANEL - 1) / PANEL, stride = panels * c_in * PANEL;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < c_in; c++) {
            double w[3][3][PANEL] = {}, rows[6][3][PANEL];  // 16 output channels at once
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

// ---- attention

struct Attention {
    const float *q, *k, *v;
    float* out;  // [batch, queries, heads * size]
    int64_t batch, heads, queries, keys, size;
    int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;  // strides
};

// Some queries against all keys of a head, a chunk of keys at a time, as in FlashAttention (Dao et al. 2022). All of it
// is turned, a vector being the same number of eight queries: then keys and values are read as they lie, no column is
// left empty whatever the size of a head, and the softmax needs no sum within a vector.

constexpr int64_t QUERIES = 128;  // of a task

// Scores [keys, PANEL] to exponentials, and the sums so far [size, PANEL] to what the highest score now makes of them.
void softmax(float* scores, int64_t keys, float* highest, float* total, float* sums, int64_t size) {
    vec top[2] = {load(highest), load(highest + W)}, sum[2] = {};
    for (int64_t j = 0; j < keys * PANEL; j += PANEL)
        top[0] = larger(top[0], load(scores + j)), top[1] = larger(top[1], load(scores + j + W));
    const vec factor[2] = {exp2(load(highest) - top[0]), exp2(load(highest + W) - top[1])};
    for (int64_t j = 0; j < keys * PANEL; j += PANEL) {
        const vec e[2] = {exp2(load(scores + j) - top[0]), exp2(load(scores + j + W) - top[1])};
        sum[0] += e[0], sum[1] += e[1];
        store(scores + j, e[0]), store(scores + j + W, e[1]);
    }
    for (int v = 0; v < 2; v++) {
        store(highest + v * W, top[v]);
        store(total + v * W, load(total + v * W) * factor[v] + sum[v]);
        for (int64_t d = 0; d < size; d++) store(sums + d * PANEL + v * W, load(sums + d * PANEL + v * W) * factor[v]);
    }
}

void attend(const Attention& s, int64_t b, int64_t h, int64_t first, int64_t chunk) {
    const int64_t rows = std::min(QUERIES, s.queries - first), panels = (rows + PANEL - 1) / PANEL;
    const int64_t one = s.size * PANEL;
    float* q = own_scratch.get(2 * panels * one + chunk * PANEL);
    float *sums = q + panels * one, *scores = sums + panels * one;
    float highest[QUERIES], total[QUERIES] = {};
    const float scale = 1.44269504f / std::sqrt(float(s.size));  // and so powers of 2 in place of e
    const float* from = s.q + b * s.q_batch + h * s.q_head + first * s.q_row;
    memset(q, 0, 8 * panels * one);  // and the sums, which follow
    for (int64_t p = 0; p < panels; p++)
        turn(from + p * PANEL * s.q_row, s.q_row, std::min<int64_t>(PANEL, rows - p * PANEL), s.size, q + p * one, PANEL,
             scale);
    std::fill(highest, highest + QUERIES, -1e30f);
    for (int64_t start = 0; start < s.keys; start += chunk) {
        const int64_t count = std::min(chunk, s.keys - start);
        const float* k = s.k + b * s.k_batch + h * s.k_head + start * s.k_row;
        const float* v = s.v + b * s.v_batch + h * s.v_head + start * s.v_row;
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t j = 0; j < count; j += 6)
                some_rows<PLAIN>(std::min<int64_t>(6, count - j), k + j * s.k_row, s.k_row, q + p * one, s.size,
                                 {scores + j * PANEL, PANEL, nullptr, nullptr}, true, false);
            softmax(scores, count, highest + p * PANEL, total + p * PANEL, sums + p * one, s.size);
            for (int64_t d = 0; d < s.size; d += 6)
                some_rows<TURNED>(std::min<int64_t>(6, s.size - d), v + d, s.v_row, scores, count,
                                  {sums + p * one + d * PANEL, PANEL, nullptr, nullptr}, false, false);
        }
    }
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t d = 0; d < s.size; d++)
            for (int64_t i = 0; i < PANEL; i += W)
                store(sums + p * one + d * PANEL + i, load(sums + p * one + d * PANEL + i) / load(total + p * PANEL + i));
        float* to = s.out + ((b * s.queries + first + p * PANEL) * s.heads + h) * s.size;
        turn(sums + p * one, PANEL, s.size, std::min<int64_t>(PANEL, rows - p * PANEL), to, s.heads * s.size);
    }
}

}  // namespace

extern "C" {

// out [m, n] = x [m, k] weight [n, k]^T + bias [n] + residual [m, n]; rows of x are ldx apart; bias and residual may be null.
void sd_linear(const float* x, int64_t ldx, const float* weight, const float* bias, const float* residual, float* out,
               int64_t m, int64_t k, int64_t n, int threads) {
    linear<PLAIN>(x, ldx, weight, bias, residual, out, m, k, n, threads);
}

// out [m, n] = value * gelu(gate), both halves of x [m, k] weight [2 n, k]^T + bias [2 n]; n is a multiple of 8.
void sd_geglu(const float* x, int64_t ldx, const float* weight, const float* bias, float* out, int64_t m, int64_t k,
              int64_t n, int threads) {
    linear<GEGLU>(x, ldx, weight, bias, nullptr, out, m, k, n, threads);
}

// The 3x3 patches around every stride-th position of x [batch, height, width, channels], zeros beyond its edges:
// [batch, height / stride, width / stride, channels * 9], rounded up, as weights [c_out, channels, 3, 3] take them.
void sd_patches(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t stride, float* out,
                int threads) {
    const int64_t down = (height + stride - 1) / stride, across = (width + stride - 1) / stride;
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

void sd_winograd(const float* x, int64_t batch, int64_t height, int64_t width, int64_t c_in, int upsampled,
                 const float* kernel, int64_t c_out, const float* bias, int64_t bias_stride, const float* residual,
                 float* out, int m, int threads) {
    const Conv s = {x, batch, height, width, c_in, upsampled, kernel, c_out, bias, bias_stride, residual, out};
    m == 4 ? winograd<4>(s, threads) : winograd<2>(s, threads);
}

// kernel [(n or n - 1)^2, panels, c_in, 16] from weight [c_out, c_in, 3, 3] and G [n, 3]; left_out is 2 or -1.
void sd_winograd_kernel(const float* weight, const int64_t* strides, int64_t c_in, int64_t c_out, int n, const double* g,
                        int left_out, float* kernel, int threads) {
    transform_kernel(weight, strides, c_in, c_out, n, g, left_out, kernel, threads);
}

// Strides count numbers; a head's numbers lie side by side.
void sd_attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t heads,
                  int64_t queries, int64_t keys, int64_t size, const int64_t* strides, int threads) {
    const Attention s = {q,          k,          v,          out,        batch,      heads,      queries,   keys,      size,
                         strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], strides[6], strides[7],
                         strides[8]};
    const int64_t chunk = std::max<int64_t>(64, std::min<int64_t>(256, 20480 / size));
    const int64_t blocks = (queries + QUERIES - 1) / QUERIES;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < batch * heads; i++)
        for (int64_t block = 0; block < blocks; block++)
            attend(s, i / heads, i % heads, block * QUERIES, std::min(chunk, keys));
}

// x [batch, positions, channels]: to mean 0 and variance 1 over each group of channels, times gain plus shift, then SiLU.
void sd_group_norm(const float* x, float* out, int64_t batch, int64_t positions, int64_t channels, int64_t groups,
                   const float* gain, const float* shift, float eps, int with_silu, int threads) {
    const int64_t part = 256, parts = (positions + part - 1) / part, in_group = channels / groups;
    // Sums of differences from the first position, which is near enough to the mean for the squares not to cancel.
    float* sums = shared_scratch.get(batch * channels * 2 * (parts + 1));
    float* affine = sums + batch * parts * 2 * channels;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t p = 0; p < parts; p++) {
                const float* origin = x + b * positions * channels;
                float *sum = sums + (b * parts + p) * 2 * channels, *squares = sum + channels;
                memset(sum, 0, 8 * channels);
                for (int64_t i = p * part; i < std::min(positions, (p + 1) * part); i++)
                    for (int64_t c = 0; c < channels; c += W) {
                        const vec d = load(x + (b * positions + i) * channels + c) - load(origin + c);
                        store(sum + c, load(sum + c) + d);
                        store(squares + c, load(squares + c) + d * d);
                    }
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t g = 0; g < groups; g++) {
                const float* origin = x + b * positions * channels;
                double mean = 0, square = 0, within = 0;
                for (int64_t c = g * in_group; c < (g + 1) * in_group; c++) {
                    double sum = 0, squares = 0;
                    for (int64_t p = 0; p < parts; p++) {
                        sum += sums[(b * parts + p) * 2 * channels + c];
                        squares += sums[(b * parts + p) * 2 * channels + channels + c];
                    }
                    const double of_channel = origin[c] + sum / positions;
                    mean += of_channel / in_group, square += of_channel * of_channel / in_group;
                    within += (squares - sum * sum / positions) / positions / in_group;
                }
                const double scale = 1 / std::sqrt(within + std::max(0.0, square - mean * mean) + eps);
                for (int64_t c = g * in_group; c < (g + 1) * in_group; c++) {
                    affine[b * 2 * channels + c] = scale * gain[c];
                    affine[b * 2 * channels + channels + c] = shift[c] - mean * scale * gain[c];
                }
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < positions; i++) {
                const float *a = affine + b * 2 * channels, *from = x + (b * positions + i) * channels;
                for (int64_t c = 0; c < channels; c += W) {
                    const vec y = load(from + c) * load(a + c) + load(a + channels + c);
                    store(out + (b * positions + i) * channels + c, with_silu ? silu(y) : y);
                }
            }
    }
}

// Each row of x [rows, channels] to mean 0 and variance 1, times gain plus shift.
void sd_layer_norm(const float* x, float* out, int64_t rows, int64_t channels, const float* gain, const float* shift,
                   float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const float* from = x + i * channels;
        vec sum{}, squares{};
        for (int64_t c = 0; c < channels; c += W) sum += load(from + c);
        float mean = 0, variance = 0;
        for (int j = 0; j < W; j++) mean += sum[j] / channels;
        for (int64_t c = 0; c < channels; c += W) {
            const vec d = load(from + c) - mean;
            squares += d * d;
        }
        for (int j = 0; j < W; j++) variance += squares[j] / channels;
        const float scale = 1 / std::sqrt(variance + eps);
        for (int64_t c = 0; c < channels; c += W)
            store(out + i * channels + c, (load(from + c) - mean) * scale * load(gain + c) + load(shift + c));
    }
}
}
