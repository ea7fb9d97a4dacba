// Which scores may be among a row's k best, by integers of 16 bits; only the scores of these are made in float32.
//
// A score of integers is off by e at the most. So the k-th best of them less e is at most the k-th best score t, and
// what scores less than t - e by integers is not one of the k best. Nothing is lost, and what is found is the same to
// the bit as without the filter.

#pragma once

#include <bit>

#include "call.h"
#include "integers.h"
#include "support.h"

namespace fcn_kernels {

#ifndef HAS_INTEGERS

struct Filter {
    static int64_t room_for(int64_t) { return 0; }
    static bool suits(const Call&) { return false; }
    Filter(const Call&, int64_t, int64_t, int64_t, int64_t, Nearest&) {}
    int64_t run() { return 0; }
};

#else

constexpr int64_t FILTER_BLOCK_BYTES = 256 << 10;  // of packed bank rows, which stay in L2 while rows pass
constexpr int64_t ALWAYS = 2;                      // of a call's filter; 0 is never
constexpr int64_t LEAST_ROWS = 24;                 // of a call, below which memory is what is waited for
constexpr int64_t LEAST_DIM = 48;                  // below, the product is not what takes time
constexpr int64_t LEAST_BANK = 16;                 // times k: of fewer, most would be kept
constexpr int64_t SPARE = 16;                      // of k entries, one more may be left by a bound that is found sooner
constexpr int64_t SETTLED = 8;                     // where one score in so many wants float32, integers do not pay

class Filter {
  public:
    static int64_t room_for(int64_t k) { return padded(2 * k + 64) + LANES; }  // whole vectors, and one to append

    static bool suits(const Call& call) {
        const bool pays = call.n >= LEAST_ROWS && call.dim >= LEAST_DIM && call.m >= LEAST_BANK * call.k;
        return call.k && call.dim <= MOST_DIM && (call.filter == ALWAYS || (call.filter && pays));
    }

    // For the rows from `first` on, past the bank from `begin` to `end`.
    Filter(const Call& call, int64_t first, int64_t rows, int64_t begin, int64_t end, Nearest& nearest)
        : call(call),
          first(first),
          rows(rows),
          begin(begin),
          end(end),
          room(room_for(call.k)),
          error(error_of_integers(call.dim)),
          nearest(nearest),
          integers(call.rows + first * call.dim, rows, call.dim),
          scores(rows * room),
          places(rows * room),
          sizes(rows),
          floors(rows),
          exact_columns(TILE_BANK * call.dim) {
        exact.columns = exact_columns;
        for (int64_t i = 0; i < rows; ++i) floors[i] = is_usable(norm(i)) ? floor_below(Acc(call.least)) : INFINITE;
    }

    // Hands the k best to `nearest`. Returns the bank row from which on there is no filter: `end`, or one before it
    // where the bound does not hold or integers do not pay.
    int64_t run() {
        for (int64_t i = 0; call.normalized && i < rows; ++i)
            if (is_usable(norm(i)) && norm(i) * norm(i) > MOST_SQUARE) return begin;
        const int64_t groups = groups_of(call.dim), size = TILE_BANK * groups;
        const int64_t block = std::max<int64_t>(1, FILTER_BLOCK_BYTES / (size * int64_t(sizeof(int32_t))));
        const Aligned packed(block * size);
        std::vector<IntegerPanel> bank(block);
        for (int64_t t = 0; t < block; ++t) bank[t].columns = reinterpret_cast<int32_t*>(packed + t * size);
        int64_t at = begin;
        while (at < end && settled * SETTLED <= rows * (at - begin) && pack(at, bank)) {
            const int64_t next = std::min(end, at + block * TILE_BANK);
            for (int64_t row = 0; row < rows; row += TILE_ROWS)
                for (int64_t t = 0; at + t * TILE_BANK < next; ++t) tile(row, at + t * TILE_BANK, bank[t], groups);
            at = next;
        }
        for (int64_t row = 0; row < rows; ++row) settle(row);
        return at;
    }

  private:
    const Call& call;
    const int64_t first, rows, begin, end, room;
    const Acc error;
    Nearest& nearest;  // of those with a score of float32
    const IntegerRows integers;
    std::vector<Acc> scores;  // of integers, [row][room], in the order of the bank rows
    std::vector<int32_t> places;
    std::vector<int64_t> sizes;
    std::vector<Acc> floors;  // what is not above has lost
    const Aligned exact_columns;
    Panel exact;
    int64_t settled = 0;

    Acc norm(int64_t row) const { return call.norms[first + row]; }

    // Scores of integers are over UNIT^2.
    Acc floor_below(Acc score) const { return (score - error) * (UNIT * UNIT); }

    bool pack(int64_t at, std::vector<IntegerPanel>& bank) const {
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

    void tile(int64_t row, int64_t column, const IntegerPanel& bank, int64_t groups) {
        alignas(BYTES) Acc found[TILE_ROWS * TILE_BANK];
        multiply(integers.panel_of(row), bank, groups, found, std::make_index_sequence<TILE_ROWS * VECTORS>());
        const int64_t used = std::min(TILE_ROWS, rows - row);
        for (int64_t r = 0; r < used; ++r) keep(row + r, found + r * TILE_BANK, column, bank.usable);
    }

    void keep(int64_t row, const Acc* found, int64_t column, uint32_t usable) {
        const uint32_t any = (above(found, floors[row]) | above(found + LANES, floors[row]) << LANES) & usable;
        for (int64_t v = 0; any && v < TILE_BANK; v += LANES) {
            const uint32_t bits = any >> v & first_bits(LANES);
            if (bits) append(row, load_work(found + v), column + v, of_others(row, column + v, bits));
        }
    }

    // Of these bank rows, those of other identities.
    uint32_t of_others(int64_t row, int64_t column, uint32_t bits) const {
        if (!call.ids) return bits;
        const __m512i own = _mm512_set1_epi64(call.ids[first + row]);
        const auto half = [&](__mmask8 of, const int64_t* ids) -> uint32_t {
            return _mm512_mask_cmpneq_epi64_mask(of, _mm512_maskz_loadu_epi64(of, ids), own);
        };
        return half(bits, call.bank_ids + column) | half(bits >> 8, call.bank_ids + column + 8) << 8;
    }

    void append(int64_t row, Vec found, int64_t column, uint32_t bits) {
        const int64_t at = row * room + sizes[row];
        store_selected(&scores[at], found, bits);
        store_selected(&places[at], COUNTING + int32_t(column - begin), bits);
        sizes[row] += std::popcount(bits);
        if (sizes[row] > room - LANES) make_room(row);
    }

    void make_room(int64_t row) {
        cut(row, call.k / SPARE);
        if (sizes[row] <= room - room / 4) return;
        settled += sizes[row];
        settle(row);
        if (nearest.cut(row) == call.k) floors[row] = std::max(floors[row], floor_below(nearest.threshold(row)));
    }

    // Leaves out what loses by a score that at least k are above, and about `spare` more.
    void cut(int64_t row, int64_t spare) {
        if (sizes[row] <= call.k) return;
        floors[row] = std::max(floors[row], floor_below(below_kth(row, spare) / (UNIT * UNIT) - error));
        Acc* const score = &scores[row * room];
        int32_t* const place = &places[row * room];
        int64_t kept = 0;
        for (int64_t i = 0; i < sizes[row]; i += LANES) {
            const uint32_t bits = above_in(row, i, floors[row]);
            const Ints from = load_ints(place + i);
            store_selected(score + kept, load_work(score + i), bits);
            store_selected(place + kept, from, bits);
            kept += std::popcount(bits);
        }
        sizes[row] = kept;
    }

    // By bisection, which counts a vector at a time; the branches of a selection by comparisons cannot be foreseen.
    Acc below_kth(int64_t row, int64_t spare) const {
        Acc low = std::max(floors[row], -2 * UNIT * UNIT), high = 2 * UNIT * UNIT;
        for (int64_t count = sizes[row]; count > call.k + spare;) {
            const Acc middle = (low + high) / 2;
            if (middle <= low || middle >= high) break;
            int64_t higher = 0;
            for (int64_t i = 0; i < sizes[row]; i += LANES) higher += std::popcount(above_in(row, i, middle));
            if (higher >= call.k) count = higher;
            (higher >= call.k ? low : high) = middle;
        }
        return low;
    }

    // Of the row's entries from i on.
    uint32_t above_in(int64_t row, int64_t i, Acc threshold) const {
        return above(&scores[row * room + i], threshold) & first_bits(sizes[row] - i);
    }

    // What may be among the k best gets its score of float32, and goes to `nearest`.
    void settle(int64_t row) {
        cut(row, 0);
        alignas(BYTES) Acc found[TILE_BANK];
        for (int64_t at = 0; at < sizes[row]; at += LANES) {
            rescore(row, at, found);
            for (int64_t j = 0; j < std::min<int64_t>(LANES, sizes[row] - at); ++j)
                if (found[j] > nearest.threshold(row)) nearest.append(row, {found[j], places[row * room + at + j]});
        }
        sizes[row] = 0;
    }

    // By the product that there is without a filter.
    void rescore(int64_t row, int64_t at, Acc* found) {
        const Row *these[LANES], *next[LANES];
        const int64_t n = std::min<int64_t>(LANES, sizes[row] - at);
        const auto bank_row = [&](int64_t i) {
            return call.bank + (begin + places[row * room + std::min(i, sizes[row] - 1)]) * call.stride;
        };
        for (int64_t j = 0; j < n; ++j) {
            these[j] = bank_row(at + j);
            next[j] = bank_row(at + LANES + j);
        }
        const Acc* u = call.rows + (first + row) * call.dim;
        exact.clear();
        if (multiply_lanes<1, 1>(u, exact, 0, these, next, n, call.dim, call.normalized, found)) return;
        exact.pack(these, next, n, call.dim, call.normalized);
        multiply<1, 1>(u, exact, call.dim, found);
    }
};

#endif

}  // namespace fcn_kernels
