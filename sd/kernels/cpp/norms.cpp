// GroupNorm with SiLU, and LayerNorm, in fp32. Channels are a multiple of W, and lie innermost.
//
// How to build and to compare: simd.h.

#include "group_norm.h"
#include "scratch.h"

using namespace sd;

// x [batch, positions, channels]: to mean 0 and variance 1 over each group of channels, times gain plus shift, then
// SiLU. out may be x.
EXPORT void sd_group_norm(const float* x, float* out, int64_t batch, int64_t positions, int64_t channels,
                          int64_t groups, const float* gain, const float* shift, float eps, int with_silu,
                          int threads) {
    const Channels s = {{x, x}, {channels, 0}, batch, positions};
    float* sums = shared_scratch.get(s.scratch());
#pragma omp parallel num_threads(threads)
    {
        const float* affine = group_norm(s, sums, groups, gain, shift, eps);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < positions; i++) {
                const float *a = affine + b * 2 * channels, *from = x + (b * positions + i) * channels;
                float* to = out + (b * positions + i) * channels;
                for (int64_t c = 0; c < channels; c += W) {
                    const vec y = load(from + c) * load(a + c) + load(a + channels + c);
                    store(to + c, with_silu ? silu(y) : y);
                }
            }
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
