// Linear layers and 3x3 convolutions of bf16 or int8 numbers, over dot.h.
//
//     sd_dot_sizes    how large a panel is
//     sd_dot_pack     weights into panels, once a model
//     sd_dot_product  A times panels, times scales, plus bias and residual; GEGLU; to fp32, bf16 or int8
//
// How to build and to compare: simd.h.

#include <cmath>

#include "dot.h"
#include "scratch.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace sd;

namespace {

enum Numbers { FP32, BF16, INT8, FP16 };  // as in native.py

constexpr int HALF_COLUMNS = COLUMNS / 2;     // of a panel of GEGLU: values first, then their gates
constexpr int64_t A_BYTES = 256 * 1024;       // of A, that a thread works on at a time
constexpr int64_t B_BYTES = 384 * 1024;       // of a panel, that all rows of a block pass before the next ones

// ---- packing

float number(const void* p, int64_t i, int type) {
    if (type == FP32) return static_cast<const float*>(p)[i];
    const uint16_t bits = static_cast<const uint16_t*>(p)[i];
    if (type == BF16) return from_bf16(bits);
    // fp16: its exponent is moved into fp32's place, and what is too small for one is a multiple of 2^-24.
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest < 0x400) return (sign ? -1.0f : 1.0f) * rest * 5.9604644775390625e-8f;
    const uint32_t wide = sign | ((rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000));
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

struct Pack {
    const void* weight;
    int type;
    int64_t columns, taps, depth;                        // of a tap
    int64_t column_stride, tap_stride, depth_stride;     // in numbers
    int geglu, remainder;
    const float* factors;  // of int8: what each column is multiplied by
    char* panels;
    int32_t* sums;  // of int8: of each column
};

template <class N>
void pack_panel(const Pack& s, int64_t panel) {
    const int64_t blocks = ceil_div(s.depth, N::GROUP * GROUPS), step = s.geglu ? HALF_COLUMNS : COLUMNS;
    typename N::B* to = reinterpret_cast<typename N::B*>(s.panels + panel * s.taps * blocks * BLOCK_BYTES);
    memset(to, 0, s.taps * blocks * BLOCK_BYTES);
    const int64_t half = s.columns / 2;
    for (int c = 0; c < COLUMNS; c++) {
        int64_t column = panel * step + c % step;
        if (column >= (s.geglu ? half : s.columns)) continue;
        if (s.geglu && c >= HALF_COLUMNS) column += half;
        int32_t sum = 0;
        for (int64_t t = 0; t < s.taps; t++)
            for (int64_t k = 0; k < s.depth; k++) {
                const int64_t from = column * s.column_stride + t * s.tap_stride + k * s.depth_stride;
                const int64_t group = k / N::GROUP;
                typename N::B& place = to[(((t * blocks + group / GROUPS) * DOT_VECTORS + c / W) * GROUPS * W +
                                           group % GROUPS * W + c % W) * N::GROUP + k % N::GROUP];
                const float x = number(s.weight, from, s.type);
                if constexpr (N::GROUP == 2) {
                    place = to_bf16(s.remainder ? x - from_bf16(to_bf16(x)) : x);
                } else {
                    place = std::lrint(std::min(127.0f, std::max(-127.0f, x * s.factors[column])));
                    sum += place;
                }
            }
        if (N::GROUP == 4) s.sums[column] = sum;
    }
}

// ---- the product

struct Product {
    const char* a;
    int64_t lda;  // bytes from row to row, or from position to position of a grid
    int64_t rows; // of the result
    int64_t height, width;  // of a grid, whose rows of A lie within a border of one position; or 0
    Taps taps;
    const char* panels;
    int64_t panel_bytes, columns;
    const float* scale;  // of each column, for int8
    const float* bias;   // of each column; bias_stride apart for each rows_of_picture rows
    int64_t bias_stride, rows_of_picture;
    const float* residual;
    void* out;
    int type, geglu;
    float factor, zero;  // of an int8 result
};

// Lanes are the rows of A that are multiplied: with AMX, where a grid's are not 16 side by side, those of its border too.
bool flat(const Product& s) {
#ifdef SD_AMX
    return s.height && s.width % 16;
#else
    return false;
#endif
}

int64_t lanes_of(const Product& s) {
    if (!flat(s)) return s.rows;
    const int64_t pictures = s.rows / (s.height * s.width), wide = s.width + 2;
    return pictures * (s.height + 2) * wide;  // the last two rows of a picture and more are for nothing
}

// Row of A and row of the result, or -1, of a lane.
void place(const Product& s, int64_t lane, const char*& a, int64_t& row) {
    a = s.a + lane * s.lda, row = lane;
    if (!s.height) return;
    const int64_t border = flat(s) ? 2 : 0, wide = s.width + border, high = s.height + border;
    const int64_t x = lane % wide, y = lane / wide % high, picture = lane / wide / high;
    if (!border) a = s.a + ((picture * (s.height + 2) + y) * (s.width + 2) + x) * s.lda;
    row = x < s.width && y < s.height ? (picture * s.height + y) * s.width + x : -1;
}

template <class N>
void finish(const Product& s, const typename N::Sum* sums, int64_t row, int64_t panel) {
    const int64_t step = s.geglu ? HALF_COLUMNS : COLUMNS, columns = s.geglu ? s.columns / 2 : s.columns;
    const float* bias = s.bias ? s.bias + row / s.rows_of_picture * s.bias_stride : nullptr;
    const auto value = [&](int64_t column, int at, int64_t count) {
        typename N::Sums sum;
        memcpy(&sum, sums + at, sizeof sum);
        vec v;
        if constexpr (N::GROUP == 2)
            v = sum;
        else
            v = __builtin_convertvector(sum, vec) * load(s.scale + column, count);
        return bias ? v + load(bias + column, count) : v;
    };
    for (int j = 0; j < step; j += W) {
        const int64_t column = panel * step + j, count = std::min<int64_t>(W, columns - column);
        if (count <= 0) return;
        vec v = value(column, j, count);
        if (s.geglu) v *= gelu(value(columns + column, HALF_COLUMNS + j, count));
        const int64_t to = row * columns + column;
        if (s.residual) v += load(s.residual + to, count);
        if (s.type == FP32) {
            store(static_cast<float*>(s.out) + to, v, count);
            continue;
        }
        char part[2 * W];
        const int bytes = s.type == BF16 ? 2 : 1;
        char* place = count == W ? static_cast<char*>(s.out) + to * bytes : part;
        if (s.type == BF16)
            store_bf16(reinterpret_cast<uint16_t*>(place), v);
        else
            store_u8(reinterpret_cast<uint8_t*>(place), v, s.factor, s.zero);
        if (count < W) memcpy(static_cast<char*>(s.out) + to * bytes, part, count * bytes);
    }
}

// Lanes `first` to `end` times panels p0 to p1.
template <class N>
void block(const Product& s, int64_t first, int64_t end, int64_t p0, int64_t p1, int64_t most) {
    const int64_t count = end - first;
    int64_t numbers = most * COLUMNS;
#ifdef SD_AMX
    const int64_t row_bytes = *std::max_element(s.taps.a, s.taps.a + s.taps.count) + s.taps.groups * 4;
    const int64_t spare = ceil_div(row_bytes, 64) * 64;  // of a row, if it is copied
    numbers += 16 * spare / 4;
#endif
    float* scratch = own_scratch.get(numbers + 4 * most);
    const char** a = reinterpret_cast<const char**>(scratch);
    int64_t* rows = reinterpret_cast<int64_t*>(scratch + 2 * most);
    typename N::Sum* sums = reinterpret_cast<typename N::Sum*>(scratch + 4 * most);
    for (int64_t i = 0; i < count; i++) place(s, first + i, a[i], rows[i]);
#ifdef SD_AMX
    if (!s.height && count % 16) {  // sixteen are read: in place of what is beyond the last ones, zeros
        char* copy = reinterpret_cast<char*>(sums + most * COLUMNS);
        memset(copy, 0, 16 * spare);
        for (int64_t i = count / 16 * 16, j = 0; i < count; i++, j++)
            a[i] = static_cast<char*>(memcpy(copy + j * spare, a[i], row_bytes));
    }
#endif
    const int64_t tap_bytes = ceil_div(s.taps.groups, GROUPS) * BLOCK_BYTES;
    const int at_once = std::max<int64_t>(1, B_BYTES / tap_bytes);
    for (int64_t p = p0; p < p1; p++) {
        const int vectors = s.geglu ? DOT_VECTORS : std::min<int64_t>(DOT_VECTORS, ceil_div(s.columns - p * COLUMNS, W));
        for (int t = 0; t < s.taps.count; t += at_once) {
            Taps taps;
            taps.count = std::min(at_once, s.taps.count - t), taps.groups = s.taps.groups;
            memcpy(taps.a, s.taps.a + t, 8 * taps.count);
            memcpy(taps.b, s.taps.b + t, 8 * taps.count);
            for (int64_t i = 0; i < count; i += DOT_ROWS)
                some_dots<N>(std::min<int64_t>(DOT_ROWS, count - i), vectors, a + i, taps, s.panels + p * s.panel_bytes,
                             sums + i * COLUMNS, t == 0);
        }
        for (int64_t i = 0; i < count; i++)
            if (rows[i] >= 0) finish<N>(s, sums + i * COLUMNS, rows[i], p);
    }
}

template <class N>
void product(const Product& s, int threads) {
    const int64_t lanes = lanes_of(s), panels = ceil_div(s.columns, COLUMNS);
    const int64_t own = s.height ? s.lda : s.taps.groups * 4 * s.taps.count;  // bytes of A that are a lane's own
    int64_t most = std::max<int64_t>(3 * DOT_ROWS, A_BYTES / own / DOT_ROWS * DOT_ROWS);
    most = ceil_div(ceil_div(lanes, ceil_div(lanes, most)), DOT_ROWS) * DOT_ROWS;
    const int64_t blocks = ceil_div(lanes, most);
    const int64_t chunks = std::min(panels, ceil_div(4 * threads, blocks)), per = ceil_div(panels, chunks);
#pragma omp parallel num_threads(threads)
    {
        const TilesInUse tiles;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++)
            for (int64_t c = 0; c < chunks; c++)
                if (c * per < panels)
                    block<N>(s, i * most, std::min(lanes, (i + 1) * most), c * per, std::min(panels, (c + 1) * per),
                             most);
        (void)tiles;
    }
}

}  // namespace

// sizes [4]: columns of a panel; bytes of a block of it; bytes of a row that a block of it multiplies; and how many
// positions after a grid must be readable.
EXPORT void sd_dot_sizes(int64_t* sizes) {
    sizes[0] = COLUMNS, sizes[1] = BLOCK_BYTES, sizes[2] = GROUPS * 4, sizes[3] = 0;
#ifdef SD_AMX
    sizes[3] = DOT_ROWS;
#endif
}

// Whether the system lets this process use the tiles, if it was built for them. To be asked before anything else.
EXPORT int sd_ready() {
#if defined(SD_AMX) && !defined(SD_AMX_EMULATED) && defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
#else
    return 1;
#endif
}

// Weights of `type` (0 fp32, 1 bf16, 3 fp16), column, tap and depth as many numbers apart as strides [3] say, into
// panels of `to` (1 bf16, 2 int8). geglu: the second half of the columns are gates of the first. remainder: what bf16
// leaves of a weight, in place of it. int8 needs factors [columns] and returns the sums [columns] of what it made.
EXPORT void sd_dot_pack(const void* weight, int type, const int64_t* strides, int64_t columns, int64_t taps,
                        int64_t depth, int to, int geglu, int remainder, const float* factors, void* panels,
                        int32_t* sums, int threads) {
    const Pack s = {weight,     type,  columns,   taps,    depth,
                    strides[0], strides[1], strides[2], geglu, remainder, factors, static_cast<char*>(panels), sums};
    const int64_t count = ceil_div(columns, COLUMNS);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t p = 0; p < count; p++) to == BF16 ? pack_panel<Bf16>(s, p) : pack_panel<Int8>(s, p);
}

// out [rows, columns] = a panels * scale + bias + residual. numbers: what a and panels are, 1 bf16 or 2 int8.
// a: rows lda bytes apart; or, with height and width, positions of grids [height + 2, width + 2] of which the inner ones
// have results. tap t: offsets[0][t] bytes into a row of a and offsets[1][t] into a panel, of `groups` groups.
// scale [columns] for int8; bias [columns], bias_stride apart for each rows_of_picture rows, or null; residual as out
// lies, in fp32, or null. geglu: out has half of the columns, value * gelu(gate). out of `type`: 0 fp32; 1 bf16; 2 int8,
// out * factor + zero.
EXPORT void sd_dot_product(int numbers, const void* a, int64_t lda, int64_t rows, int64_t height, int64_t width,
                           int64_t taps, int64_t groups, const int64_t* offsets, const void* panels,
                           int64_t panel_bytes, int64_t columns, const float* scale, const float* bias,
                           int64_t bias_stride, int64_t rows_of_picture, const float* residual, void* out, int type,
                           int geglu, float factor, float zero, int threads) {
    Product s = {static_cast<const char*>(a), lda, rows, height, width, {}, static_cast<const char*>(panels),
                 panel_bytes, columns, scale, bias, bias_stride, rows_of_picture, residual, out, type, geglu, factor,
                 zero};
    s.taps.count = taps, s.taps.groups = groups;
    memcpy(s.taps.a, offsets, 8 * taps);
    memcpy(s.taps.b, offsets + taps, 8 * taps);
    numbers == BF16 ? product<Bf16>(s, threads) : product<Int8>(s, threads);
}
