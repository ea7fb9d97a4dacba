// Functions of a vector of float32, and norms of rows of tokens. Polynomials are our own least-maximum fits.

#pragma once

#include <cmath>
#include <cstdint>

#include "columns.h"

namespace fcn_kernels {

constexpr Acc EPS_LAYER_NORM = 1e-5f;

typedef int32_t Bits __attribute__((vector_size(BYTES)));

inline Vec fill(Acc value) { return value - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where one is not a number

inline Acc largest_lane(Vec x) {
    Acc most = x[0];
    for (int lane = 1; lane < LANES; ++lane) most = x[lane] > most ? x[lane] : most;
    return most;
}

inline Acc sum_of_lanes(Vec x) {
    Acc total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// exp(x) for x <= 88, within 2e-7 of itself; 2e-38 below -87.
inline Vec exponential(Vec x) {
    constexpr Acc LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    constexpr Acc WHOLE = 12582912;  // 1.5 * 2^23: what is added to it is rounded to a whole number, in the lowest bits
    const Vec kept = larger(fill(-87), x);  // NaN stays
    const Vec shifted = kept * LOG2_E + WHOLE, power = shifted - WHOLE;
    const Vec rest = (kept - power * LN2_HIGH) - power * LN2_LOW;  // in +-ln(2) / 2
    Vec series = fill(1.38144672e-3f);
    series = series * rest + 8.36878084e-3f;
    series = series * rest + 4.16683927e-2f;
    series = series * rest + 1.66665196e-1f;
    series = series * rest + 0.49999994f;
    const Vec value = series * (rest * rest) + rest + 1;
    return reinterpret_cast<Vec>(reinterpret_cast<Bits>(value) + (reinterpret_cast<Bits>(shifted) << 23));
}

// x Phi(x) = max(x, 0) - t Q(t), with t = |x| and the normal distribution's upper tail Q(t) = exp(g(t) - t^2 / 2), of
// which g is smooth. Within 5e-8; nothing cancels.
inline Vec gelu(Vec x) {
    const Vec t = larger(x, -x), s = t < 8 ? t : fill(8);
    Vec g = fill(-1.17169816e-6f);
    g = g * s + 1.73864391e-5f;
    g = g * s - 7.93395739e-5f;
    g = g * s - 2.24123403e-4f;
    g = g * s + 5.08311391e-3f;
    g = g * s - 3.65386978e-2f;
    g = g * s + 1.81765422e-1f;
    g = g * s - 7.97897816e-1f;
    g = g * s - 6.93146408e-1f;
    return larger(x, Vec{}) - t * exponential(g - t * t * 0.5f);
}

// LayerNorm without weight and bias, of `dim` columns; `to` is 0 from there to the next multiple of LANES.
inline void layer_norm(const Acc* x, int64_t dim, Acc eps, Acc* to) {
    const int64_t whole = dim / LANES * LANES, left = dim - whole;
    Vec inside = {}, sum = {}, squares = {};
    for (int64_t lane = 0; lane < left; ++lane) inside[lane] = 1;
    for (int64_t c = 0; c < whole; c += LANES) sum += load_work(x + c);
    if (left) sum += inside * load_work(x + whole);
    const Acc mean = sum_of_lanes(sum) / Acc(dim);
    for (int64_t c = 0; c < whole; c += LANES) {
        const Vec apart = load_work(x + c) - mean;
        squares += apart * apart;
        store_work(to + c, apart);
    }
    if (left) {
        const Vec apart = inside * (load_work(x + whole) - mean);
        squares += apart * apart;
        store_work(to + whole, apart);
    }
    const Acc scale = 1 / std::sqrt(sum_of_lanes(squares) / Acc(dim) + eps);
    for (int64_t c = 0; c < dim; c += LANES) store_work(to + c, load_work(to + c) * scale);
}

}  // namespace fcn_kernels
