// What bf16 or int8 products (dot_product.cpp) read, made of fp32 numbers in one pass: norms, SiLU, upsampling and the
// concatenation of a skip connection on the way.
//
//     sd_dot_rows     rows, after a LayerNorm or as they are
//     sd_dot_grid     a grid with a border of zeros, after a GroupNorm and SiLU or as it is
//     sd_dot_patches  3x3 patches of a grid, for convolutions that leave positions out
//
// A row's numbers are of a type: 1 bf16; 2 int8, x * factor + zero within 0 to 255; 3 bf16 twice, each number and what
// its rounding left, for products of three that are as good as fp32's. Rows are padded with zeros to whole blocks.
// How to build and to compare: simd.h.

#include "dot.h"
#include "group_norm.h"
#include "scratch.h"

using namespace sd;

namespace {

struct To {
    int type;
    float factor, zero;
    int64_t channels, padded;  // numbers of a row: what there are, and with the zeros to the end of a block

    int64_t bytes() const { return padded * (type == 1 ? 2 : type == 2 ? 1 : 4); }
    uint8_t nothing() const { return type == 2 ? uint8_t(zero) : 0; }  // a byte of what stands for zero

    void put(char* row, int64_t c, vec x, int64_t count) const {
        char part[2 * W];
        const int each = type == 2 ? 1 : 2;
        for (int which = 0; which < (type == 3 ? 2 : 1); which++) {
            char *place = row + (which * padded + c) * each, *to = count == W ? place : part;
            if (type == 2)
                store_u8(reinterpret_cast<uint8_t*>(to), x, factor, zero);
            else
                store_bf16(reinterpret_cast<uint16_t*>(to), x);
            if (type == 3) x -= load_bf16(reinterpret_cast<const uint16_t*>(to));
            if (count < W) memcpy(place, part, count * each);
        }
    }

    void pad(char* row) const {
        const int64_t each = type == 2 ? 1 : 2, rest = (padded - channels) * each;
        if (!rest) return;
        for (int which = 0; which < (type == 3 ? 2 : 1); which++)
            memset(row + (which * padded + channels) * each, nothing(), rest);
    }
};

}  // namespace

// out [rows, padded] = x [rows, channels] in fp32, or in bf16 if short_x, rows ldx apart; with gain and shift [channels]
// after a LayerNorm.
EXPORT void sd_dot_rows(const void* x, int short_x, int64_t ldx, int64_t rows, int64_t channels, int64_t padded,
                        const float* gain, const float* shift, float eps, int type, float factor, float zero, void* out,
                        int threads) {
    const To to = {type, factor, zero, channels, padded};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const auto at = [&](int64_t c, int64_t count) {
            if (!short_x) return load(static_cast<const float*>(x) + i * ldx + c, count);
            uint16_t part[W] = {};
            memcpy(part, static_cast<const uint16_t*>(x) + i * ldx + c, 2 * count);
            return load_bf16(part);
        };
        char* row = static_cast<char*>(out) + i * to.bytes();
        float mean = 0, scale = 1;
        if (gain) {
            vec sum{}, squares{};
            for (int64_t c = 0; c < channels; c += W) sum += at(c, std::min<int64_t>(W, channels - c));
            for (int j = 0; j < W; j++) mean += sum[j] / channels;
            for (int64_t c = 0; c < channels; c += W) {
                const int64_t count = std::min<int64_t>(W, channels - c);
                vec d = at(c, count) - mean;
                if (count < W)
                    for (int j = count; j < W; j++) d[j] = 0;
                squares += d * d;
            }
            float variance = 0;
            for (int j = 0; j < W; j++) variance += squares[j] / channels;
            scale = 1 / std::sqrt(variance + eps);
        }
        for (int64_t c = 0; c < channels; c += W) {
            const int64_t count = std::min<int64_t>(W, channels - c);
            vec v = at(c, count);
            if (gain) v = (v - mean) * scale * load(gain + c, count) + load(shift + c, count);
            to.put(row, c, v, count);
        }
        to.pad(row);
    }
}

// out [batch, high + 2, wide + 2, padded] = x [batch, height, width, channels] and the more_channels of `more` after
// them, twice as high and wide if upsampled; with gain and shift after a GroupNorm of so many groups, and SiLU.
EXPORT void sd_dot_grid(const float* x, int64_t channels, const float* more, int64_t more_channels, int64_t batch,
                        int64_t height, int64_t width, int upsampled, int64_t padded, int64_t groups, const float* gain,
                        const float* shift, float eps, int with_silu, int type, float factor, float zero, void* out,
                        int threads) {
    const Channels s = {{x, more ? more : x}, {channels, more_channels}, batch, height * width};
    const int64_t high = height << upsampled, wide = width << upsampled, all = s.all();
    const To to = {type, factor, zero, all, padded};
    float* sums = gain ? shared_scratch.get(s.scratch()) : nullptr;
#pragma omp parallel num_threads(threads)
    {
        const float* affine = gain ? group_norm(s, sums, groups, gain, shift, eps) : nullptr;
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < high + 2; i++) {
                char* row = static_cast<char*>(out) + (b * (high + 2) + i) * (wide + 2) * to.bytes();
                if (i == 0 || i == high + 1) {
                    memset(row, to.nothing(), (wide + 2) * to.bytes());
                    continue;
                }
                memset(row, to.nothing(), to.bytes());
                memset(row + (wide + 1) * to.bytes(), to.nothing(), to.bytes());
                for (int64_t j = 0; j < wide; j++) {
                    const int64_t at = (b * height + ((i - 1) >> upsampled)) * width + (j >> upsampled);
                    char* place = row + (j + 1) * to.bytes();
                    const float* a = gain ? affine + b * 2 * all : nullptr;
                    for (int which = 0, before = 0; which < 2; before += s.channels[which++])
                        for (int64_t c = 0; c < s.channels[which]; c += W) {
                            const int64_t count = std::min<int64_t>(W, s.channels[which] - c);
                            vec v = load(s.x[which] + at * s.channels[which] + c, count);
                            if (gain) v = v * load(a + before + c, count) + load(a + all + before + c, count);
                            to.put(place, before + c, with_silu ? silu(v) : v, count);
                        }
                    to.pad(place);
                }
            }
    }
}

// out [batch, down * across, 9, bytes] = the 3x3 patches of a grid [batch, height + 2, width + 2, bytes] around every
// second position; of those to the right of and below it, if moved.
EXPORT void sd_dot_patches(const void* grid, int64_t batch, int64_t height, int64_t width, int64_t bytes, int moved,
                           void* out, int threads) {
    const int64_t down = (height + 1 - moved) / 2, across = (width + 1 - moved) / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < down; i++)
            for (int64_t j = 0; j < across; j++)
                for (int64_t tap = 0; tap < 9; tap++) {
                    const int64_t y = 2 * i + moved + tap / 3, z = 2 * j + moved + tap % 3;
                    const char* from =
                        static_cast<const char*>(grid) + ((b * (height + 2) + y) * (width + 2) + z) * bytes;
                    memcpy(static_cast<char*>(out) + (((b * down + i) * across + j) * 9 + tap) * bytes, from, bytes);
                }
}
