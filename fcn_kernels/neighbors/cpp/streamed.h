// Scores of a few rows with bank rows that are read four at a time, almost as they lie: memory gives them a fifth
// faster than the sixteen at once that are read where sums go by columns.

#pragma once

#include "call.h"
#include "integers.h"
#include "product.h"

#ifdef HAS_INTEGERS

namespace fcn_kernels {

constexpr int64_t STREAMED_ROWS = 4;  // of a call at the most
constexpr int TOGETHER = 4;           // bank rows whose sums are made at once
constexpr int64_t AHEAD = 4;          // of the row that is asked for

class StreamedScores {
  public:
    static constexpr Acc ONE = 1;
    static Acc error(int64_t dim) { return error_of_sums(dim); }

    StreamedScores(const Call& call, int64_t first, int64_t rows)
        : call(call), width(padded(call.dim)), rows(rows), units(STREAMED_ROWS * width), extreme(width) {
        units.clear();
        const Acc* const from = call.units + first * call.dim;
        for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * call.dim, call.dim, units + i * width);
    }

    static constexpr int64_t tiles = 1;  // of bank rows at a time

    // Bank rows from `at` to `end`. False where one is called unit and is not.
    bool take(int64_t at, int64_t end) {
        members = 0;
        bool unit = true;
        for (int64_t half = 0; half < TILE_BANK && at + half < end; half += LANES) {
            const int64_t n = std::min<int64_t>(LANES, end - at - half);
            unit &= rows == 1 ? take_lanes<1>(at + half, n, half) : take_lanes<STREAMED_ROWS>(at + half, n, half);
        }
        return unit;
    }

    uint32_t usable(int64_t) const { return members; }

    const Acc* of_tile(int64_t, int64_t, Acc*) const { return scores; }

  private:
    const Call& call;
    const int64_t width, rows;
    const Aligned units, extreme;  // [row][width], 0 where there is no row; and a bank row
    uint32_t members = 0;
    alignas(BYTES) Acc scores[STREAMED_ROWS * TILE_BANK];

    template <int USED>
    bool take_lanes(int64_t at, int64_t n, int64_t half) {
        Vec squares[LANES] = {}, products[USED][LANES] = {};
        int64_t j = 0;
        for (; j + TOGETHER <= n; j += TOGETHER) sum<USED, TOGETHER>(at, j, squares, products);
        for (; j < n; ++j) sum<USED, 1>(at, j, squares, products);
        const Vec square = sums_of_lanes(squares);
        if (call.normalized && above(square, MOST_SQUARE)) return false;
        const uint32_t plain = above(square, LEAST_SQUARE) & ~above(square, 1 / LEAST_SQUARE);
        const Vec factor = call.normalized ? Vec{} + 1 : 1 / reinterpret_cast<Vec>(_mm512_sqrt_ps(square));
        for (int r = 0; r < USED; ++r) store_work(scores + r * TILE_BANK + half, sums_of_lanes(products[r]) * factor);
        members |= plain << half;
        for (uint32_t bits = ~plain & first_bits(n); bits; bits &= bits - 1)
            take_extreme(at + __builtin_ctz(bits), half + __builtin_ctz(bits));
        return true;
    }

    // Of bank rows from at + j on, which are not yet summed over lanes.
    template <int USED, int COUNT>
    void sum(int64_t at, int64_t j, Vec (&squares)[LANES], Vec (&products)[USED][LANES]) const {
        const Row* from = call.bank + (at + j) * call.stride;
        Vec square[COUNT] = {}, product[COUNT][USED] = {};
        const auto add = [&](int64_t c, auto load_row) {
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; ++i) {
                const Row* row = from + i * call.stride + c;
                const Vec x = load_row(row);
                __builtin_prefetch(row + AHEAD * call.stride);
                square[i] += x * x;
#pragma GCC unroll 4
                for (int r = 0; r < USED; ++r) product[i][r] += x * load_work(units + r * width + c);
            }
        };
        int64_t c = 0;
        for (; c + LANES <= call.dim; c += LANES) add(c, [](const Row* row) { return load(row); });
        if (c < call.dim) add(c, [&](const Row* row) { return load_part(row, call.dim - c); });
        for (int i = 0; i < COUNT; ++i) {
            squares[j + i] = square[i];
            for (int r = 0; r < USED; ++r) products[r][j + i] = product[i][r];
        }
    }

    // A row whose square leaves the type's range.
    void take_extreme(int64_t at, int64_t place) {
        const Row* row = call.bank + at * call.stride;
        const Acc norm = norm_of(row, call.dim);
        if (!is_usable(norm)) return;
        members |= uint32_t(1) << place;
        copy_unit(row, call.dim, call.normalized ? 1 : norm, extreme);
        for (int64_t r = 0; r < rows; ++r)
            scores[r * TILE_BANK + place] = product<Acc>(extreme, units + r * width, call.dim);
    }

    // Lane j: the sum of vectors[j]'s lanes.
    static Vec sums_of_lanes(Vec (&vectors)[LANES]) {
        transpose(vectors);
        Vec sum = {};
        for (const Vec& vector : vectors) sum += vector;
        return sum;
    }
};

}  // namespace fcn_kernels

#endif
