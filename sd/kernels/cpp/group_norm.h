// What GroupNorm knows of a picture before it changes a number: a factor and a summand for each channel.
//
// The channels may lie in two tensors, as a skip connection's do: they need no concatenation. How to build: simd.h.

#pragma once

#include <cmath>

#include "simd.h"

namespace sd {

constexpr int64_t PART = 256;  // positions whose sums one thread takes

// x [batch, positions, channels] and the channels after them, or none.
struct Channels {
    const float* x[2];
    int64_t channels[2];
    int64_t batch, positions;

    int64_t all() const { return channels[0] + channels[1]; }
    int64_t parts() const { return ceil_div(positions, PART); }
    // Numbers of the scratch that the statistics take: [batch, parts, 2, channels], then [batch, 2, channels].
    int64_t scratch() const { return batch * all() * 2 * (parts() + 1); }
};

// Sizes are copied to locals below: through `s` they would be read again after each store, which might be to them.

// Of differences from the first position, which is near enough to the mean for the squares not to cancel.
inline void sum_part(const Channels& s, float* sums, int64_t b, int64_t part) {
    const int64_t all = s.all(), begin = part * PART, end = std::min(s.positions, begin + PART);
    float *sum = sums + (b * s.parts() + part) * 2 * all, *squares = sum + all;
    memset(sum, 0, 8 * all);
    for (int which = 0; which < 2; which++) {
        const int64_t channels = s.channels[which];
        const float *x = s.x[which] + b * s.positions * channels, *origin = x;
        for (int64_t i = begin; i < end; i++) {
            const auto add = [&](int64_t c, int64_t count) {
                const vec d = load(x + i * channels + c, count) - load(origin + c, count);
                store(sum + c, load(sum + c, count) + d, count);
                store(squares + c, load(squares + c, count) + d * d, count);
            };
            const int64_t whole = channels / W * W;
            for (int64_t c = 0; c < whole; c += W) add(c, W);
            if (whole < channels) add(whole, channels - whole);
        }
        sum += channels, squares += channels;
    }
}

// The parts' sums of group g of picture b to what its channels are multiplied by, and what is added.
inline void merge_parts(const Channels& s, float* sums, int64_t groups, const float* gain, const float* shift, float eps,
                        int64_t b, int64_t g) {
    const int64_t all = s.all(), parts = s.parts(), in_group = all / groups;
    const float* of_picture = sums + b * parts * 2 * all;
    float* affine = sums + s.batch * parts * 2 * all + b * 2 * all;
    double mean = 0, square = 0, within = 0;
    for (int64_t c = g * in_group; c < (g + 1) * in_group; c++) {
        double sum = 0, squares = 0;
        for (int64_t p = 0; p < parts; p++) {
            sum += of_picture[p * 2 * all + c];
            squares += of_picture[p * 2 * all + all + c];
        }
        const int which = c >= s.channels[0];
        const float first = s.x[which][b * s.positions * s.channels[which] + c - which * s.channels[0]];
        const double of_channel = first + sum / s.positions;
        mean += of_channel / in_group, square += of_channel * of_channel / in_group;
        within += (squares - sum * sum / s.positions) / s.positions / in_group;
    }
    const double scale = 1 / std::sqrt(within + std::max(0.0, square - mean * mean) + eps);
    for (int64_t c = g * in_group; c < (g + 1) * in_group; c++) {
        affine[c] = scale * gain[c];
        affine[all + c] = shift[c] - mean * scale * gain[c];
    }
}

// To be called by all threads of a team: sums [scratch()] -> the affine [batch, 2, channels] within it.
inline const float* group_norm(const Channels& s, float* sums, int64_t groups, const float* gain, const float* shift,
                               float eps) {
    const int64_t parts = s.parts();
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t part = 0; part < parts; part++) sum_part(s, sums, b, part);
#pragma omp for collapse(2) schedule(static)
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t g = 0; g < groups; g++) merge_parts(s, sums, groups, gain, shift, eps, b, g);
    return sums + s.batch * parts * 2 * s.all();
}

}  // namespace sd
