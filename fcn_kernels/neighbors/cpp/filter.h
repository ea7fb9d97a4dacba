// Which scores may be among a row's k best, by scores that are made faster and are off by a known error: of integers
// where many rows share the bank, of sums in memory's order where a few rows wait for it. Only what may be among the
// best gets the score that it has without a filter.
//
// A faster score is off by e at the most. So the k-th best of them less e is at most the k-th best score t, and what
// has a faster score of less than t - e is not one of the k best. Nothing is lost, and what is found is the same to the
// bit as without the filter.

#pragma once

#include <bit>

#include "call.h"
#include "integers.h"
#include "streamed.h"
#include "support.h"

namespace fcn_kernels {

#ifndef HAS_INTEGERS

inline bool has_filter(const Call&) { return false; }
inline int64_t room_of_filter(int64_t) { return 0; }
inline int64_t filter(const Call&, int64_t, int64_t, int64_t begin, int64_t, Nearest&) { return begin; }

#else

enum Filtering { NEVER, WHERE_IT_PAYS, BY_INTEGERS, BY_STREAM };  // the last two wherever they can

constexpr int64_t LEAST_ROWS = 24;  // of a call, below which memory is what is waited for
constexpr int64_t LEAST_DIM = 48;   // below, the product is not what takes time
constexpr int64_t LEAST_BANK = 16;  // times k: of fewer, most would be kept
constexpr int64_t SPARE = 16;       // of k entries, one more may be left by a bound that is found sooner
constexpr int64_t SETTLED = 8;      // where one score in so many is made anew, the filter does not pay

inline bool filters(const Call& call, Filtering how, bool pays) {
    pays = pays && call.dim >= LEAST_DIM && call.m >= LEAST_BANK * call.k;
    return call.k && call.dim <= MOST_DIM && (call.filter == how || (call.filter == WHERE_IT_PAYS && pays));
}
inline bool has_integers(const Call& call) { return filters(call, BY_INTEGERS, call.n >= LEAST_ROWS); }
inline bool is_streamed(const Call& call) { return call.n <= STREAMED_ROWS && filters(call, BY_STREAM, true); }
inline bool has_filter(const Call& call) { return has_integers(call) || is_streamed(call); }
inline int64_t room_of_filter(int64_t k) { return padded(2 * k + 64) + LANES; }  // whole vectors, and one to append

// Scores says how the faster scores are made; those of ONE stand for a score of 1.
template <class Scores>
class Filter {
  public:
    // For the rows from `first` on, past the bank from `begin` to `end`.
    Filter(const Call& call, int64_t first, int64_t rows, int64_t begin, int64_t end, Nearest& nearest)
        : call(call),
          first(first),
          rows(rows),
          begin(begin),
          end(end),
          room(room_of_filter(call.k)),
          error(Scores::error(call.dim)),
          nearest(nearest),
          faster(call, first, rows),
          scores(rows * room),
          places(rows * room),
          sizes(rows),
          floors(rows),
          exact_columns(TILE_BANK * call.dim) {
        exact.columns = exact_columns;
        for (int64_t i = 0; i < rows; ++i) floors[i] = is_usable(norm(i)) ? floor_below(Acc(call.least)) : INFINITE;
    }

    // Hands the k best to `nearest`. Returns the bank row from which on there is no filter: `end`, or one before it
    // where the bound does not hold or the filter does not pay.
    int64_t run() {
        for (int64_t i = 0; call.normalized && i < rows; ++i)
            if (is_usable(norm(i)) && norm(i) * norm(i) > MOST_SQUARE) return begin;
        int64_t at = begin;
        while (at < end && settled * SETTLED <= rows * (at - begin)) {
            const int64_t next = std::min(end, at + faster.tiles * TILE_BANK);
            if (!faster.take(at, next)) break;
            for (int64_t row = 0; row < rows; row += TILE_ROWS)
                for (int64_t t = 0; at + t * TILE_BANK < next; ++t) tile(row, at + t * TILE_BANK, t);
            at = next;
        }
        for (int64_t row = 0; row < rows; ++row) settle(row);
        return at;
    }

  private:
    const Call& call;
    const int64_t first, rows, begin, end, room;
    const Acc error;
    Nearest& nearest;  // of those with a score as there is without a filter
    Scores faster;
    std::vector<Acc> scores;  // the faster ones, [row][room], in the order of the bank rows
    std::vector<int32_t> places;
    std::vector<int64_t> sizes;
    std::vector<Acc> floors;  // what is not above has lost
    const Aligned exact_columns;
    Panel exact;
    int64_t settled = 0;

    Acc norm(int64_t row) const { return call.norms[first + row]; }

    Acc floor_below(Acc score) const { return (score - error) * Scores::ONE; }

    void tile(int64_t row, int64_t column, int64_t t) {
        alignas(BYTES) Acc room[TILE_ROWS * TILE_BANK];
        const Acc* const found = faster.of_tile(row, t, room);
        const int64_t used = std::min(TILE_ROWS, rows - row);
        for (int64_t r = 0; r < used; ++r) keep(row + r, found + r * TILE_BANK, column, faster.usable(t));
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
        floors[row] = std::max(floors[row], floor_below(below_kth(row, spare) / Scores::ONE - error));
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
        Acc low = std::max(floors[row], -2 * Scores::ONE), high = 2 * Scores::ONE;
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

    // What may be among the k best gets the score that it has without a filter, and goes to `nearest`.
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
        const Acc* u = call.units + (first + row) * call.dim;
        exact.clear();
        if (multiply_lanes<1, 1>(u, exact, 0, these, next, n, call.dim, call.normalized, found)) return;
        exact.pack(these, next, n, call.dim, call.normalized);
        multiply<1, 1>(u, exact, call.dim, found);
    }
};

// Hands the k best of some rows, past the bank from `begin` to `end`, to `nearest`. Returns where it ended.
inline int64_t filter(const Call& call, int64_t first, int64_t rows, int64_t begin, int64_t end, Nearest& nearest) {
    if (is_streamed(call)) return Filter<StreamedScores>(call, first, rows, begin, end, nearest).run();
    return Filter<IntegerScores>(call, first, rows, begin, end, nearest).run();
}

#endif

}  // namespace fcn_kernels
