// Which scores may be among a row's k best, by integers of 16 bits; only the scores of these are made in float32.
//
// A score of integers is off by e at the most. So the k-th best of them less e is at most the k-th best score t, and
// what scores less than t - e by integers is not one of the k best. Nothing is lost, and what is found is the same to
// the bit as without the filter.

#pragma once

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
constexpr int64_t SETTLED = 8;                     // where one score in so many wants float32, integers do not pay

class Filter {
  public:
    static int64_t room_for(int64_t k) { return 3 * k + 64; }

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
          entries(rows * room),
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
    std::vector<Entry> entries;  // those with a score of integers
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
        alignas(BYTES) Acc scores[TILE_ROWS * TILE_BANK];
        multiply(integers.panel_of(row), bank, groups, scores, std::make_index_sequence<TILE_ROWS * VECTORS>());
        const int64_t used = std::min(TILE_ROWS, rows - row);
        for (int64_t r = 0; r < used; ++r) keep(row + r, scores + r * TILE_BANK, column, bank.usable);
    }

    void keep(int64_t row, const Acc* scores, int64_t column, const bool* usable) {
        for (int64_t v = 0; v < TILE_BANK; v += LANES) {
            for (uint32_t bits = above(scores + v, floors[row]); bits; bits &= bits - 1) {
                const int64_t j = v + __builtin_ctz(bits);
                const bool own = call.ids && call.bank_ids[column + j] == call.ids[first + row];
                if (usable[j] && !own && scores[j] > floors[row]) append(row, {scores[j], int32_t(column + j - begin)});
            }
        }
    }

    Entry* of_row(int64_t row) { return entries.data() + row * room; }

    void append(int64_t row, Entry entry) {
        of_row(row)[sizes[row]++] = entry;
        if (sizes[row] < room) return;
        cut(row);
        if (sizes[row] <= room - room / 4) return;
        settled += sizes[row];
        settle(row);
    }

    // The k best by integers come first; what cannot be among the k best is left out.
    void cut(int64_t row) {
        Entry* const from = of_row(row);
        if (sizes[row] <= call.k) return;
        std::nth_element(from, from + (call.k - 1), from + sizes[row], is_better);
        leave_out(row, call.k, from[call.k - 1].score / (UNIT * UNIT) - error);
    }

    // Of the entries from `at` on those that lose by the k-th best score, or a lower one.
    void leave_out(int64_t row, int64_t at, Acc kth) {
        floors[row] = std::max(floors[row], floor_below(kth));
        Entry *const from = of_row(row), *const end = from + sizes[row];
        sizes[row] = std::remove_if(from + at, end, [&](auto& e) { return !(e.score > floors[row]); }) - from;
    }

    // What may be among the k best gets its score of float32, and goes to `nearest`.
    void settle(int64_t row) {
        cut(row);
        Entry* const from = of_row(row);
        const int64_t sure = std::min(sizes[row], call.k);
        rescore(row, from, sure);
        if (sure < sizes[row]) {
            const auto worst = std::min_element(from, from + sure, [](auto& a, auto& b) { return a.score < b.score; });
            leave_out(row, sure, worst->score);
            rescore(row, from + sure, sizes[row] - sure);
        }
        std::sort(from, from + sizes[row], [](auto& a, auto& b) { return a.place < b.place; });
        for (int64_t i = 0; i < sizes[row]; ++i)
            if (from[i].score > nearest.threshold(row)) nearest.append(row, from[i]);
        sizes[row] = 0;
        if (nearest.cut(row) == call.k) floors[row] = std::max(floors[row], floor_below(nearest.threshold(row)));
    }

    // By the product that there is without a filter.
    void rescore(int64_t row, Entry* of, int64_t count) {
        alignas(BYTES) Acc scores[TILE_BANK];
        const Row *these[TILE_BANK], *next[TILE_BANK];
        const auto bank_row = [&](int64_t i) { return call.bank + (begin + of[i].place) * call.stride; };
        for (int64_t at = 0; at < count; at += TILE_BANK) {
            const int64_t n = std::min(TILE_BANK, count - at);
            for (int64_t j = 0; j < n; ++j) {
                these[j] = bank_row(at + j);
                next[j] = bank_row(std::min(at + TILE_BANK + j, count - 1));
            }
            exact.pack(these, next, n, call.dim, call.normalized);
            multiply<1, 1>(call.rows + (first + row) * call.dim, exact, call.dim, scores);
            for (int64_t j = 0; j < n; ++j) of[at + j].score = scores[j];
        }
    }
};

#endif

}  // namespace fcn_kernels
