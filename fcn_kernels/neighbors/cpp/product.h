// Scores of a few rows against a few bank rows: a matrix product in which every score is summed by itself, column after
// column, so that it depends on its two rows alone.

#pragma once

#ifdef __AVX__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "columns.h"

namespace fcn_kernels {

// A tile has as many sums as registers hold beside what they are made of: 24 of 32, or 12 of 16.
constexpr int64_t TILE_ROWS = BYTES == 64 ? 12 : 6, VECTORS = 2, TILE_BANK = VECTORS * LANES;

// Zeroed, and aligned to vectors.
class Aligned {
  public:
    explicit Aligned(int64_t size)
        : values(static_cast<Acc*>(::operator new(size * sizeof(Acc), std::align_val_t(BYTES)))) {
        std::fill_n(values, size, Acc(0));
    }
    Aligned(const Aligned&) = delete;
    ~Aligned() { ::operator delete(values, std::align_val_t(BYTES)); }
    operator Acc*() const { return values; }

  private:
    Acc* values;
};

// As sets.py has it: NaN is not.
inline bool is_usable(Acc norm) { return norm >= std::numeric_limits<Acc>::min() && norm < INFINITE; }

// The row over its norm, in two steps, as the inverse of an extreme norm has few digits or none: its power of two, and
// the inverse of what is left.
inline void copy_unit(const Row* row, int64_t dim, Acc norm, Acc* to) {
    const Acc power = std::scalbn(Acc(1), -std::ilogb(norm)), inverse = 1 / (norm * power);
    for_columns(row, dim, [&](Vec x, int64_t c, int) { store_work(to + c, x * power * inverse); });
}

// Rows (n, C) that are unit already, to panels of TILE_ROWS: [panel][column][row], 0 where there is no row.
inline void pack_rows(const Acc* rows, int64_t n, int64_t dim, Acc* panels) {
    for (int64_t i = 0; i < n; ++i) {
        Acc* to = panels + i / TILE_ROWS * TILE_ROWS * dim + i % TILE_ROWS;
        for (int64_t c = 0; c < dim; ++c) to[c * TILE_ROWS] = rows[i * dim + c];
    }
}

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

// TILE_BANK bank rows: their elements, what their scores are multiplied by, and which rows are usable.
struct Panel {
    Acc* columns;  // [column][TILE_BANK]
    alignas(BYTES) Acc factors[TILE_BANK];
    bool usable[TILE_BANK];

    // `n` rows, or TILE_BANK if there are more.
    void pack(const Row* rows, int64_t stride, int64_t n, int64_t dim, bool normalized) {
        std::fill_n(usable, TILE_BANK, false);
        std::fill_n(factors, TILE_BANK, Acc(1));
        for (int64_t j = 0; j < std::min(TILE_BANK, n); j += LANES)
            pack_lanes(j, rows + j * stride, stride, std::min<int64_t>(LANES, n - j), dim, normalized);
    }

  private:
    // Read once, as memory is what a few rows' search waits for. What is not usable touches no other column.
    void pack_lanes(int64_t at, const Row* rows, int64_t stride, int64_t n, int64_t dim, bool normalized) {
        const Row* from[LANES];
        for (int64_t j = 0; j < LANES; ++j) from[j] = rows + std::min(j, n - 1) * stride;
        Vec squares[UNROLLED] = {};
        int64_t c = 0;
        const auto pack = [&](int64_t count, auto load_lanes) {
            Vec lanes[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; ++j) {
                lanes[j] = load_lanes(from[j] + c);
                __builtin_prefetch(from[j] + LANES * stride + c);  // the next rows
            }
            transpose(lanes);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                if (i >= count) continue;
                squares[i % UNROLLED] += lanes[i] * lanes[i];
                store_work(columns + (c + i) * TILE_BANK + at, lanes[i]);
            }
        };
        for (; c + LANES <= dim; c += LANES) pack(LANES, [](const Row* row) { return load(row); });
        if (c < dim) pack(dim - c, [&](const Row* row) { return load_part(row, dim - c); });
        const Vec square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
        for (int64_t j = 0; j < n; ++j) {
            usable[at + j] = true;
            if (square[j] > LEAST_SQUARE && square[j] < 1 / LEAST_SQUARE) {
                if (!normalized) factors[at + j] = 1 / std::sqrt(square[j]);
            } else {
                repack(at + j, from[j], dim, normalized);
            }
        }
    }

    // A row whose square leaves the type's range.
    void repack(int64_t j, const Row* row, int64_t dim, bool normalized) {
        const Acc norm = norm_of(row, dim);
        usable[j] = is_usable(norm);
        if (!usable[j] || normalized) return;
        std::vector<Acc> unit(padded(dim));
        copy_unit(row, dim, norm, unit.data());
        for (int64_t c = 0; c < dim; ++c) columns[c * TILE_BANK + j] = unit[c];
    }
};

// scores[row][j] of the first USED rows of a panel of rows.
template <int USED>
inline void multiply(const Acc* rows, const Panel& bank, int64_t dim, Acc* scores) {
    Vec sums[USED][VECTORS] = {};
    for (int64_t c = 0; c < dim; ++c) {
        const Vec first = load_work(bank.columns + c * TILE_BANK);
        const Vec second = load_work(bank.columns + c * TILE_BANK + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < USED; ++r) {
            const Acc x = rows[c * TILE_ROWS + r];
            sums[r][0] += x * first;
            sums[r][1] += x * second;
        }
    }
    for (int r = 0; r < USED; ++r)
        for (int v = 0; v < VECTORS; ++v)
            store_work(scores + r * TILE_BANK + v * LANES, sums[r][v] * load_work(bank.factors + v * LANES));
}

// The same of `used` rows or more, with no more work than they want.
inline void multiply(int64_t used, const Acc* rows, const Panel& bank, int64_t dim, Acc* scores) {
    if (used == 1)
        multiply<1>(rows, bank, dim, scores);
    else if (used <= TILE_ROWS / 3)
        multiply<TILE_ROWS / 3>(rows, bank, dim, scores);
    else
        multiply<TILE_ROWS>(rows, bank, dim, scores);
}

// Bit j: scores[j] > threshold.
inline uint32_t above(const Acc* scores, Acc threshold) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Acc, float>)
        return _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), _mm512_set1_ps(threshold), _CMP_GT_OQ);
    else
        return _mm512_cmp_pd_mask(_mm512_loadu_pd(scores), _mm512_set1_pd(threshold), _CMP_GT_OQ);
#elif defined(__AVX__)
    if constexpr (std::is_same_v<Acc, float>)
        return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores), _mm256_set1_ps(threshold), _CMP_GT_OQ));
    else
        return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(scores), _mm256_set1_pd(threshold), _CMP_GT_OQ));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(scores[lane] > threshold) << lane;
    return bits;
#endif
}

}  // namespace fcn_kernels
