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
#include <type_traits>
#include <vector>

#include "aligned.h"
#include "columns.h"
#include "transpose.h"

namespace fcn_kernels {

// A tile has as many sums as registers hold beside what they are made of: 24 of 32, or 12 of 16.
constexpr int64_t TILE_ROWS = BYTES == 64 ? 12 : 6, VECTORS = 2, TILE_BANK = VECTORS * LANES;

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

// TILE_BANK bank rows: their elements, what their scores are multiplied by, and which rows are usable.
struct Panel {
    Acc* columns;  // [column][TILE_BANK]
    alignas(BYTES) Acc factors[TILE_BANK];
    bool usable[TILE_BANK];

    // `n` rows, or TILE_BANK if there are more.
    void pack(const Row* rows, int64_t stride, int64_t n, int64_t dim, bool normalized) {
        const Row *these[TILE_BANK], *next[TILE_BANK];
        for (int64_t j = 0; j < TILE_BANK; ++j) {
            these[j] = rows + j * stride;
            next[j] = rows + (j + TILE_BANK) * stride;
        }
        pack(these, next, std::min(TILE_BANK, n), dim, normalized);
    }

    // These `n` rows; the next ones are asked for.
    void pack(const Row* const* rows, const Row* const* next, int64_t n, int64_t dim, bool normalized) {
        clear();
        for (int64_t j = 0; j < n; j += LANES) {
            const int64_t count = std::min<int64_t>(LANES, n - j);
            const bool plain = measure(j, rows + j, next + j, count, dim, normalized,
                                       [&](int64_t c, Vec x) { store_work(columns + c * TILE_BANK + j, x); });
            for (int64_t i = j; !plain && i < j + count; ++i)
                if (!usable[i]) repack(i, rows[i], dim, normalized);
        }
    }

    void clear() {
        std::fill_n(usable, TILE_BANK, false);
        std::fill_n(factors, TILE_BANK, Acc(1));
    }

    // use(column, its elements of LANES rows) column by column, then the rows' factors; whether all squares are within
    // the type's range: a row is called usable if its own is. Rows are read once, as memory is what a few rows' search
    // waits for. What is not usable touches no other lane.
    template <class Use>
    bool measure(int64_t at, const Row* const* rows, const Row* const* next, int64_t n, int64_t dim, bool normalized,
                 Use use) {
        const Row *from[LANES], *ask[LANES];
        for (int64_t j = 0; j < LANES; ++j) {
            from[j] = rows[std::min(j, n - 1)];
            ask[j] = next[std::min(j, n - 1)];
        }
        Vec squares[UNROLLED] = {};
        int64_t c = 0;
        const auto add = [&](int64_t count, auto load_lanes) {
            Vec lanes[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; ++j) {
                lanes[j] = load_lanes(from[j] + c);
                __builtin_prefetch(ask[j] + c, 0, 2);  // into L2, which waits for more lines at once than L1
            }
            transpose(lanes);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                if (i >= count) continue;
                squares[i % UNROLLED] += lanes[i] * lanes[i];
                use(c + i, lanes[i]);
            }
        };
        for (; c + LANES <= dim; c += LANES) add(LANES, [](const Row* row) { return load(row); });
        if (c < dim) add(dim - c, [&](const Row* row) { return load_part(row, dim - c); });
        const Vec square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
        bool plain = true;
        for (int64_t j = 0; j < n; ++j) {
            usable[at + j] = square[j] > LEAST_SQUARE && square[j] < 1 / LEAST_SQUARE;
            plain &= usable[at + j];
            if (usable[at + j] && !normalized) factors[at + j] = 1 / std::sqrt(square[j]);
        }
        return plain;
    }

  private:
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

// scores[row][j] of the first USED rows of a panel of STRIDE rows.
template <int USED, int STRIDE = TILE_ROWS>
inline void multiply(const Acc* rows, const Panel& bank, int64_t dim, Acc* scores) {
    Vec sums[USED][VECTORS] = {};
    for (int64_t c = 0; c < dim; ++c) {
        const Vec first = load_work(bank.columns + c * TILE_BANK);
        const Vec second = load_work(bank.columns + c * TILE_BANK + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < USED; ++r) {
            const Acc x = rows[c * STRIDE + r];
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

// The same of USED rows and up to LANES bank rows themselves, which are not written to memory anew. False where a bank
// row's square leaves the type's range: then there are no scores.
template <int USED, int STRIDE = TILE_ROWS>
inline bool multiply_lanes(const Acc* rows, Panel& bank, int64_t at, const Row* const* these, const Row* const* next,
                           int64_t n, int64_t dim, bool normalized, Acc* scores) {
    Vec sums[USED] = {};
    const bool plain = bank.measure(at, these, next, n, dim, normalized, [&](int64_t c, Vec x) {
#pragma GCC unroll 12
        for (int r = 0; r < USED; ++r) sums[r] += rows[c * STRIDE + r] * x;
    });
    for (int r = 0; r < USED; ++r) store_work(scores + r * TILE_BANK + at, sums[r] * load_work(bank.factors + at));
    return plain;
}

// The same of TILE_BANK bank rows, or the `n` that are left.
template <int USED>
inline bool multiply_few(const Acc* rows, Panel& bank, const Row* from, int64_t stride, int64_t n, int64_t dim,
                         bool normalized, Acc* scores) {
    bank.clear();
    for (int64_t j = 0; j < std::min(TILE_BANK, n); j += LANES) {
        const Row *these[LANES], *next[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
            these[i] = from + (j + i) * stride;
            next[i] = from + (j + i + TILE_BANK) * stride;
        }
        const int64_t count = std::min<int64_t>(LANES, n - j);
        if (!multiply_lanes<USED>(rows, bank, j, these, next, count, dim, normalized, scores)) return false;
    }
    return true;
}

// Bit j: values[j] > threshold.
inline uint32_t above(Vec values, Acc threshold) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Acc, float>)
        return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(values), _mm512_set1_ps(threshold), _CMP_GT_OQ);
    else
        return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(values), _mm512_set1_pd(threshold), _CMP_GT_OQ);
#elif defined(__AVX__)
    const Picks picks = values > threshold;
    if constexpr (std::is_same_v<Acc, float>)
        return _mm256_movemask_ps(reinterpret_cast<__m256>(picks));
    else
        return _mm256_movemask_pd(reinterpret_cast<__m256d>(picks));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(values[lane] > threshold) << lane;
    return bits;
#endif
}
inline uint32_t above(const Acc* scores, Acc threshold) { return above(load_work(scores), threshold); }

}  // namespace fcn_kernels
