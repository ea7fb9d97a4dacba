// A square of vectors.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "columns.h"

namespace fcn_kernels {

using Lanes = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;
typedef Lanes Picks __attribute__((vector_size(BYTES)));

// Lane l of what comes of it is lane picks[l] of both vectors, one after the other.
inline Vec pick(Vec a, Vec b, Picks picks) {
#ifdef __clang__
    Vec out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = picks[lane] < LANES ? a[picks[lane]] : b[picks[lane] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, picks);
#endif
}

template <int HALF, size_t... L>
inline void swap_halves(Vec& upper, Vec& lower, std::index_sequence<L...>) {
    const Picks first = {Lanes(L & HALF ? LANES + L - HALF : L)...};
    const Picks second = {Lanes(L & HALF ? LANES + L : L + HALF)...};
    const Vec both = pick(upper, lower, first);
    lower = pick(upper, lower, second);
    upper = both;
}

// rows[i][lane] to rows[lane][i]: quarters of the matrix change places, then quarters of these.
template <int HALF = LANES / 2>
inline void transpose(Vec (&rows)[LANES]) {
    if constexpr (HALF > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
            if (!(i & HALF)) swap_halves<HALF>(rows[i], rows[i + HALF], std::make_index_sequence<LANES>());
        transpose<HALF / 2>(rows);
    }
}

}  // namespace fcn_kernels
