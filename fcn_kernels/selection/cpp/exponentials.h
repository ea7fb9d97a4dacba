// exp of many numbers, a vector register at a time.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "columns.h"

namespace fcn_kernels {

constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;  // log 2; times an exponent, the first is exact

// e^x for x <= 0, within an ulp, of float; of double it is the library's. With x = n log 2 + r, |r| <= log(2) / 2, it
// is 2^n (1 + r + r^2 / 2! + ... + r^7 / 7!).
template <class Values>
Values exp_of(Values x) {
    if constexpr (std::is_same_v<Acc, double>) {
        for (int lane = 0; lane < LANES; ++lane) x[lane] = std::exp(x[lane]);
        return x;
    } else {
        typedef int32_t Bits __attribute__((vector_size(BYTES)));
        constexpr float LOG2_E = 0x1.715476p0f;
        constexpr float ROUND = 0x1.8p23f;    // what is added to this is an integer
        const Values least = Values{} - 150;  // e^-150 is 0
        x = x > least ? x : least;
        const Values n = (x * LOG2_E + ROUND) - ROUND, r = (x - n * LN2_HIGH) - n * LN2_LOW;
        Values series = Values{} + 1 / 5040.f;
        for (const float term : {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f})
            series = series * r + term;
        // in two halves, as 2^n may be below the least normal number
        const Bits whole = __builtin_convertvector(n, Bits), half = whole >> 1;
        const auto power = [](Bits of) { return reinterpret_cast<Values>((of + 127) << 23); };
        return series * power(half) * power(whole - half);
    }
}

// Puts e^x in the place of each of `count` numbers that are at most 0.
inline void exponentials(Acc* values, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store_work(values + i, exp_of(load_work(values + i)));
    if (i < count) {
        Acc rest[LANES] = {};
        std::copy(values + i, values + count, rest);
        store_work(rest, exp_of(load_work(rest)));
        std::copy_n(rest, count - i, values + i);
    }
}

}  // namespace fcn_kernels
