// Rows rounded to integers of 16 bits, and products of these, twice as fast as float32's.

#pragma once

#include <utility>

#include "call.h"
#include "product.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(FLOAT64)
#define HAS_INTEGERS

namespace fcn_kernels {

constexpr int64_t GROUP = 2;           // columns in a lane of 32 bits
constexpr Acc UNIT = 32000;            // what stands for 1: no sum of products leaves 32 bits, as |q . p| <= |q| |p|
constexpr Acc MOST_SQUARE = 1.01f;     // of a row that is called unit
constexpr Acc TO_WHOLE = 0x1.8p23f;    // of what is added to it no fraction is left
constexpr int64_t MOST_DIM = 1 << 14;  // for which the bounds here hold
constexpr int64_t INTEGER_BYTES = 256 << 10;  // of packed bank rows, which stay in L2 while rows pass

typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef int32_t LooseInts __attribute__((vector_size(BYTES), aligned(sizeof(int32_t)), may_alias));
typedef int16_t LooseShorts __attribute__((vector_size(BYTES / 2), aligned(sizeof(int16_t)), may_alias));
typedef int32_t Pair __attribute__((may_alias));

inline int64_t groups_of(int64_t dim) { return (dim + GROUP - 1) / GROUP; }
inline int64_t padded_shorts(int64_t dim) { return (dim + GROUP * LANES - 1) / (GROUP * LANES) * GROUP * LANES; }

// How far two sums of a score may be apart that are made in different orders: products, and squares of norms, whose
// roundings come to 1.2 (C + 16) 2^-24 at the most, and single operations.
inline Acc error_of_sums(int64_t dim) { return Acc(dim + 16) * 0x1p-23f + 2e-6f; }

// q, to the nearest; `to` has to be 0 from C to whole vectors. for_each(use) calls use(vector, column, 0 to 3).
template <class ForEach>
inline void round_columns(ForEach for_each, Acc factor, int16_t* to) {
    for_each([&](Vec x, int64_t c, int) {
        const Vec whole = (x * factor + TO_WHOLE) - TO_WHOLE;
        *reinterpret_cast<LooseShorts*>(to + c) =
            __builtin_convertvector(__builtin_convertvector(whole, Ints), LooseShorts);
    });
}

// Of a row that is unit already.
inline void round_unit(const Acc* row, int64_t dim, int16_t* to) {
    const auto for_each = [&](auto use) {
        int64_t c = 0;
        for (; c + LANES <= dim; c += LANES) use(load_work(row + c), c, 0);
        Acc rest[LANES] = {};
        std::copy(row + c, row + dim, rest);
        if (c < dim) use(load_work(rest), c, 0);
    };
    round_columns(for_each, UNIT, to);
}

// Rows as panels of TILE_ROWS: [panel][group][row] of GROUP integers.
class IntegerRows {
  public:
    IntegerRows(const Acc* rows, int64_t n, int64_t dim)
        : size(TILE_ROWS * groups_of(dim) * GROUP), integers((n + TILE_ROWS - 1) / TILE_ROWS * size) {
        std::vector<int16_t> q(padded_shorts(dim));
        for (int64_t i = 0; i < n; ++i) {
            round_unit(rows + i * dim, dim, q.data());
            int16_t* to = integers.data() + i / TILE_ROWS * size + i % TILE_ROWS * GROUP;
            for (int64_t c = 0; c < dim; ++c) to[c / GROUP * TILE_ROWS * GROUP + c % GROUP] = q[c];
        }
    }
    const Pair* panel_of(int64_t row) const {
        return reinterpret_cast<const Pair*>(integers.data() + row / TILE_ROWS * size);
    }

  private:
    const int64_t size;  // of a panel
    std::vector<int16_t> integers;
};

// TILE_BANK bank rows.
struct IntegerPanel {
    int32_t* columns;  // [group][TILE_BANK] of GROUP integers
    uint32_t usable;   // bit j: of bank row j

    // `n` rows, or TILE_BANK if there are more; `shorts` has room for LANES, and is 0. False where a row is called unit
    // and is not.
    bool pack(const Row* rows, int64_t stride, int64_t n, int64_t dim, bool normalized, int16_t* shorts) {
        const int64_t width = padded_shorts(dim), groups = groups_of(dim);
        bool unit = true;
        usable = 0;
        for (int64_t at = 0; at < TILE_BANK; at += LANES) {
            for (int64_t j = 0; j < LANES; ++j)
                unit &=
                    set(at + j, at + j < n ? rows + (at + j) * stride : nullptr, dim, normalized, shorts + j * width);
            for (int64_t first = 0; first < groups; first += LANES) {
                Vec lanes[LANES];
#pragma GCC unroll 16
                for (int j = 0; j < LANES; ++j)
                    lanes[j] = load_work(reinterpret_cast<Acc*>(shorts + j * width + first * GROUP));
                transpose(lanes);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i)
                    if (first + i < groups)
                        store_work(reinterpret_cast<Acc*>(columns + (first + i) * TILE_BANK + at), lanes[i]);
            }
        }
        return unit;
    }

  private:
    bool set(int64_t j, const Row* row, int64_t dim, bool normalized, int16_t* to) {
        const Acc norm = row ? norm_of(row, dim) : 0;
        if (!is_usable(norm)) {
            std::fill_n(to, dim, int16_t(0));
            return true;
        }
        usable |= uint32_t(1) << j;
        const Acc square = norm * norm;
        if (normalized) {
            if (square > MOST_SQUARE) return false;
            round_columns([&](auto use) { for_columns(row, dim, use); }, UNIT, to);
        } else if (square > LEAST_SQUARE && square < 1 / LEAST_SQUARE) {
            round_columns([&](auto use) { for_columns(row, dim, use); }, UNIT / norm, to);
        } else {
            std::vector<Acc> unit(padded(dim));
            copy_unit(row, dim, norm, unit.data());
            round_unit(unit.data(), dim, to);
        }
        return true;
    }
};

// GCC 12 writes each sum of the intrinsic's to memory, which takes twice as long.
inline void add_products(Ints& sums, Ints rows, Ints bank) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(rows), "v"(bank));
}

constexpr Ints COUNTING = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline uint32_t first_bits(int64_t count) { return count < LANES ? (1u << count) - 1 : (1u << LANES) - 1; }

// Those lanes whose bits are set, one after the other; the rest of `to`, a vector, is 0.
inline void store_selected(Acc* to, Vec from, uint32_t bits) {
    store_work(to, _mm512_maskz_compress_ps(__mmask16(bits), from));
}
inline void store_selected(int32_t* to, Ints from, uint32_t bits) {
    *reinterpret_cast<LooseInts*>(to) =
        reinterpret_cast<Ints>(_mm512_maskz_compress_epi32(__mmask16(bits), reinterpret_cast<__m512i>(from)));
}

inline Ints load_ints(const int32_t* from) { return *reinterpret_cast<const LooseInts*>(from); }

// scores[row][j] = sum of q_row p_j.
template <size_t... I>
inline void multiply(const Pair* rows, const IntegerPanel& bank, int64_t groups, Acc* scores,
                     std::index_sequence<I...>) {
    Ints sums[sizeof...(I)] = {};
    for (int64_t g = 0; g < groups; ++g) {
        const int32_t* column = bank.columns + g * TILE_BANK;
        const Ints columns[VECTORS] = {load_ints(column), load_ints(column + LANES)};
        (add_products(sums[I], Ints{} + rows[g * TILE_ROWS + I / VECTORS], columns[I % VECTORS]), ...);
    }
    (store_work(scores + I * LANES, __builtin_convertvector(sums[I], Vec)), ...);
}

// Of some rows with bank rows, many at a time.
class IntegerScores {
  public:
    static constexpr Acc ONE = UNIT * UNIT;

    // How far a score of integers over ONE may be from the float32 product's: u = q / UNIT + a rest, of which each
    // element is 1/2 / UNIT at the most, and v likewise, so that
    //     |u . v - q . p / UNIT^2| <= |u - q / UNIT| |v| + |q / UNIT| |v - p / UNIT| <= rest (1.01 + 1.01 + rest)
    // To this come the roundings of sums.
    static Acc error(int64_t dim) {
        const Acc rest = std::sqrt(Acc(dim)) / 2 / UNIT * 1.001f + 1e-6f;
        return rest * (2 * MOST_SQUARE + rest) + error_of_sums(dim);
    }

    IntegerScores(const Call& call, int64_t first, int64_t rows)
        : tiles(std::max<int64_t>(1, INTEGER_BYTES / (TILE_BANK * groups_of(call.dim) * int64_t(sizeof(Pair))))),
          call(call),
          size(TILE_BANK * groups_of(call.dim)),
          rows(call.units + first * call.dim, rows, call.dim),
          columns(tiles * size),
          bank(tiles) {
        for (int64_t t = 0; t < tiles; ++t) bank[t].columns = reinterpret_cast<int32_t*>(columns + t * size);
    }

    const int64_t tiles;  // of bank rows at a time

    // Bank rows from `at` to `end`. False where one is called unit and is not.
    bool take(int64_t at, int64_t end) {
        std::vector<int16_t> shorts(LANES * padded_shorts(call.dim));
        bool unit = true;
        for (IntegerPanel& panel : bank) {
            if (at >= end) break;
            const Row* from = call.bank + at * call.stride;
            unit &= panel.pack(from, call.stride, end - at, call.dim, call.normalized, shorts.data());
            at += TILE_BANK;
        }
        return unit;
    }

    uint32_t usable(int64_t tile) const { return bank[tile].usable; }

    // [TILE_ROWS][TILE_BANK] from a row on, in `room`.
    const Acc* of_tile(int64_t row, int64_t tile, Acc* room) const {
        const auto all = std::make_index_sequence<TILE_ROWS * VECTORS>();
        multiply(rows.panel_of(row), bank[tile], groups_of(call.dim), room, all);
        return room;
    }

  private:
    const Call& call;
    const int64_t size;  // of a panel
    const IntegerRows rows;
    const Aligned columns;
    std::vector<IntegerPanel> bank;
};

}  // namespace fcn_kernels

#endif
