// From sums of sets to their descriptors: the mixers, the confidence, and the weighted mean.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "calls.h"
#include "layer.h"
#include "numbers.h"

namespace fcn_kernels {

struct Weights {
    const Acc *weight, *bias;  // (outputs, inputs), (outputs,)
};

struct Packed {
    const Acc *panels, *bias;  // of layer.h
};

struct Mixer {
    const Acc *gate, *gain, *shift;
    Weights token1, token2;  // across the centers
    Packed channel1, channel2;
};

struct FuseCall {
    const double *sums, *styles, *masses;  // (B, M, C), (B, M, d), (B, M)
    const Acc* centers;                    // (M, d)
    Packed fc1, fc2;
    int64_t sets, clusters, width, dim, depth, channels, threads;  // channels: C, or 1
    double least_mass;
};

struct Fused {
    Acc *descriptor, *norm, *means, *confidence;
};

inline void gelu_rows(Acc* x, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += LANES) {
            Acc* const at = x + r * stride + c;
            store_work(at, gelu(load_work(at)));
        }
}

// Some sets on their way: tokens (sets M, 2 d).
class Fusion {
  public:
    Fusion(const FuseCall& call, const Mixer* mixers, const Fused& out, int64_t first, int64_t sets)
        : call(call),
          mixers(mixers),
          out(out),
          first(first),
          sets(sets),
          rows(sets * call.clusters),
          width(2 * call.dim),
          stride(whole_tiles(width)),
          wide(std::max(stride, whole_tiles(call.channels))),
          tokens(room() * stride),
          unit(room() * stride),
          made(room() * wide),
          hidden(2 * call.clusters * LANES) {}

    void run() {
        begin();
        for (int64_t l = 0; l < call.depth; ++l) mix(mixers[l]);
        apply(call.fc1, width, width, tokens, stride, unit, stride);
        gelu_rows(unit, stride, rows, width);
        apply(call.fc2, width, call.channels, unit, stride, made, wide);
        for (int64_t b = 0; b < sets; ++b) finish(b);
    }

  private:
    const FuseCall& call;
    const Mixer* mixers;
    const Fused& out;
    const int64_t first, sets, rows, width, stride, wide;
    const Aligned tokens, unit, made, hidden;

    int64_t room() const { return (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

    void apply(const Packed& w, int64_t inputs, int64_t outputs, const Acc* x, int64_t x_stride, Acc* to,
               int64_t to_stride) const {
        Layer(nullptr, w.bias, inputs, outputs, w.panels).apply(x, x_stride, rows, to, to_stride);
    }

    // Means, and tokens [centers ; styles].
    void begin() {
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = first * call.clusters + r;
            const double mass = std::max(call.masses[at], call.least_mass);
            for (int64_t c = 0; c < call.width; ++c)
                out.means[at * call.width + c] = Acc(call.sums[at * call.width + c] / mass);
            Acc* const token = tokens + r * stride;
            std::copy_n(call.centers + r % call.clusters * call.dim, call.dim, token);
            for (int64_t c = 0; c < call.dim; ++c) token[call.dim + c] = Acc(call.styles[at * call.dim + c] / mass);
            std::fill(token + width, token + stride, Acc(0));
        }
    }

    void normalize(const Mixer& m) {
        for (int64_t r = 0; r < rows; ++r) {
            Acc* const to = unit + r * stride;
            layer_norm(tokens + r * stride, width, EPS_LAYER_NORM, to);
            int64_t c = 0;
            for (; c + LANES <= width; c += LANES)
                store_work(to + c, load_work(to + c) * load_work(m.gain + c) + load_work(m.shift + c));
            for (; c < width; ++c) to[c] = to[c] * m.gain[c] + m.shift[c];
        }
    }

    void mix(const Mixer& m) {
        normalize(m);
        for (int64_t b = 0; b < sets; ++b)
            for (int64_t c = 0; c < width; c += LANES) mix_centers(m, b * call.clusters * stride + c);
        normalize(m);
        apply(m.channel1, width, call.dim, unit, stride, made, wide);
        gelu_rows(made, wide, rows, call.dim);
        apply(m.channel2, call.dim, width, made, wide, unit, stride);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < width; c += LANES) {
                const int64_t at = r * stride + c;
                store_work(tokens + at, load_work(tokens + at) + load_work(unit + at));
            }
    }

    // Of LANES channels of a set.
    void mix_centers(const Mixer& m, int64_t at) {
        const int64_t n = call.clusters;
        for (int64_t j = 0; j < 2 * n; ++j) {
            Vec sum = fill(m.token1.bias[j]);
            for (int64_t k = 0; k < n; ++k) sum += m.token1.weight[j * n + k] * load_work(unit + at + k * stride);
            store_work(hidden + j * LANES, gelu(sum));
        }
        for (int64_t k = 0; k < n; ++k) {
            Vec sum = fill(m.token2.bias[k]);
            for (int64_t j = 0; j < 2 * n; ++j) sum += m.token2.weight[k * 2 * n + j] * load_work(hidden + j * LANES);
            Acc* const token = tokens + at + k * stride;
            store_work(token, *m.gate * load_work(token) + sum);
        }
    }

    // Confidence, and the means' sum weighted by it.
    void finish(int64_t b) {
        const int64_t n = call.clusters, set = first + b;
        Acc* const logits = made + b * n * wide;
        for (int64_t c = 0; c < call.channels; c += LANES) {
            Vec top = load_work(logits + c), total = {};
            for (int64_t m = 1; m < n; ++m) top = larger(load_work(logits + m * wide + c), top);
            for (int64_t m = 0; m < n; ++m) {
                const Vec share = exponential(load_work(logits + m * wide + c) - top);
                total += share;
                store_work(logits + m * wide + c, share);
            }
            for (int64_t m = 0; m < n; ++m) store_work(logits + m * wide + c, load_work(logits + m * wide + c) / total);
        }
        Acc* const descriptor = out.descriptor + set * call.width;
        std::fill_n(descriptor, call.width, Acc(0));
        for (int64_t m = 0; m < n; ++m) {
            const Acc* const share = logits + m * wide;
            const Acc* const mean = out.means + (set * n + m) * call.width;
            std::copy_n(share, call.channels, out.confidence + (set * n + m) * call.channels);
            for (int64_t c = 0; c < call.width; ++c) descriptor[c] += share[call.channels == 1 ? 0 : c] * mean[c];
        }
        double square = 0;
        for (int64_t c = 0; c < call.width; ++c) square += double(descriptor[c]) * double(descriptor[c]);
        const Acc norm = out.norm[set] = Acc(std::sqrt(square));
        for (int64_t c = 0; norm > 0 && c < call.width; ++c) descriptor[c] /= norm;
    }
};

inline void fuse(const FuseCall& call, const Mixer* mixers, const Fused& out) {
    constexpr int64_t SETS = 16;  // at a time
    const int64_t tasks = (call.sets + SETS - 1) / SETS;
    Caught caught;
#pragma omp parallel for schedule(dynamic) num_threads(std::max<int64_t>(1, std::min(call.threads, tasks)))
    for (int64_t i = 0; i < tasks; ++i)
        caught.run([&] { Fusion(call, mixers, out, i * SETS, std::min(SETS, call.sets - i * SETS)).run(); });
    caught.rethrow();
}

}  // namespace fcn_kernels
