// Functions of a vector of float32, and norms of rows of tokens. Polynomials are our own least-maximum fits.

#pragma once

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

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

// 2^x for x < 128, within 1.5e-7 of itself; 0, or 1e-38, below -126.
inline Vec power_of_two(Vec x) {
#ifdef __AVX512DQ__
    const Vec r = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 1));  // x - floor(x)
#else
    constexpr Acc WHOLE = 12582912;  // 1.5 * 2^23: what is added to it is rounded to a whole number, in the lowest bits
    const Vec kept = larger(fill(-126), x);  // NaN stays
    const Vec shifted = (kept - Acc(0.5)) + WHOLE;
    const Vec r = kept - (shifted - WHOLE);
#endif
    Vec series = fill(1.86713007e-3f);
    series = series * r + 9.01703032e-3f;
    series = series * r + 5.57999131e-2f;
    series = series * r + 2.40164450e-1f;
    series = series * r + 6.93151312e-1f;
    series = series * r + 1;
#ifdef __AVX512DQ__
    return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(series), reinterpret_cast<__m512>(x)));
#else
    return reinterpret_cast<Vec>(reinterpret_cast<Bits>(series) + (reinterpret_cast<Bits>(shifted) << 23));
#endif
}

inline Vec exponential(Vec x) { return power_of_two(x * Acc(1.44269504)); }

// x Phi(x) = max(x, 0) - t Q(t), with t = |x| and the normal distribution's upper tail Q(t) = 2^(g(t) - log2(e) t^2 /
// 2) of a smooth g. Within 5e-8; nothing cancels.
inline Vec gelu(Vec x) {
    const Vec t = larger(x, -x), s = t < 8 ? t : fill(8);
    Vec g = fill(-1.69040312e-06f);
    g = g * s + 2.50833295e-05f;
    g = g * s - 1.14462810e-04f;
    g = g * s - 3.23341722e-04f;
    g = g * s + 7.33338323e-03f;
    g = g * s - 5.27141981e-02f;
    g = g * s + 2.62232073e-01f;
    g = g * s - 1.15112322e+00f;
    g = g * s - 9.99998885e-01f;
    return larger(x, Vec{}) - t * power_of_two(g - t * t * 0.72134752f);
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
