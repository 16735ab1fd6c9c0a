// GroupNorm with SiLU, and LayerNorm, in fp32. Channels are a multiple of W, and lie innermost.
//
// How to build and to compare: simd.h.

#include <cmath>

#include "scratch.h"
#include "simd.h"

using namespace sd;

namespace {

constexpr int64_t PART = 256;  // positions whose sums one thread takes

struct GroupNorm {
    const float* x;
    float* out;
    int64_t batch, positions, channels, groups;
    const float *gain, *shift;
    float eps;
    int64_t parts;
    float* sums;    // [batch, parts, 2, channels]: of differences from the first position, and of their squares
    float* affine;  // [batch, 2, channels]: factor and summand
};

// Sizes are copied to locals below: through `s` they would be read again after each store, which might be to them.

// Differences from the first position, which is near enough to the mean for the squares not to cancel.
void sum_part(const GroupNorm& s, int64_t b, int64_t part) {
    const int64_t channels = s.channels, end = std::min(s.positions, (part + 1) * PART);
    const float *x = s.x + b * s.positions * channels, *origin = x;
    float *sum = s.sums + (b * s.parts + part) * 2 * channels, *squares = sum + channels;
    memset(sum, 0, 8 * channels);
    for (int64_t i = part * PART; i < end; i++)
        for (int64_t c = 0; c < channels; c += W) {
            const vec d = load(x + i * channels + c) - load(origin + c);
            store(sum + c, load(sum + c) + d);
            store(squares + c, load(squares + c) + d * d);
        }
}

// The parts' sums of group g of picture b to what its channels are multiplied by, and what is added.
void merge_parts(const GroupNorm& s, int64_t b, int64_t g) {
    const int64_t channels = s.channels, in_group = channels / s.groups;
    const float *origin = s.x + b * s.positions * channels, *sums = s.sums + b * s.parts * 2 * channels;
    float* affine = s.affine + b * 2 * channels;
    double mean = 0, square = 0, within = 0;
    for (int64_t c = g * in_group; c < (g + 1) * in_group; c++) {
        double sum = 0, squares = 0;
        for (int64_t p = 0; p < s.parts; p++) {
            sum += sums[p * 2 * channels + c];
            squares += sums[p * 2 * channels + channels + c];
        }
        const double of_channel = origin[c] + sum / s.positions;
        mean += of_channel / in_group, square += of_channel * of_channel / in_group;
        within += (squares - sum * sum / s.positions) / s.positions / in_group;
    }
    const double scale = 1 / std::sqrt(within + std::max(0.0, square - mean * mean) + s.eps);
    for (int64_t c = g * in_group; c < (g + 1) * in_group; c++) {
        affine[c] = scale * s.gain[c];
        affine[channels + c] = s.shift[c] - mean * scale * s.gain[c];
    }
}

void normalize(const GroupNorm& s, int64_t b, int64_t i, bool with_silu) {
    const int64_t channels = s.channels;
    const float *a = s.affine + b * 2 * channels, *from = s.x + (b * s.positions + i) * channels;
    float* to = s.out + (b * s.positions + i) * channels;
    for (int64_t c = 0; c < channels; c += W) {
        const vec y = load(from + c) * load(a + c) + load(a + channels + c);
        store(to + c, with_silu ? silu(y) : y);
    }
}

}  // namespace

// x [batch, positions, channels]: to mean 0 and variance 1 over each group of channels, times gain plus shift, then
// SiLU. out may be x.
EXPORT void sd_group_norm(const float* x, float* out, int64_t batch, int64_t positions, int64_t channels,
                          int64_t groups, const float* gain, const float* shift, float eps, int with_silu,
                          int threads) {
    const int64_t parts = (positions + PART - 1) / PART;
    float* sums = shared_scratch.get(batch * channels * 2 * (parts + 1));
    const GroupNorm s = {x,    out,   batch, positions, channels, groups,
                         gain, shift, eps,   parts,     sums,     sums + batch * parts * 2 * channels};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t part = 0; part < parts; part++) sum_part(s, b, part);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t g = 0; g < groups; g++) merge_parts(s, b, g);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < positions; i++) normalize(s, b, i, with_silu);
    }
}

// Each row of x [rows, channels] to mean 0 and variance 1, times gain plus shift. out may be x.
EXPORT void sd_layer_norm(const float* x, float* out, int64_t rows, int64_t channels, const float* gain,
                          const float* shift, float eps, int threads) {
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
