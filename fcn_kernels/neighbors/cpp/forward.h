// Rows walked past the bank. A walk takes some rows past a part of the bank, and a thread takes a walk after another;
// what a row gets does not depend on how they are cut.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"
#include "calls.h"
#include "filter.h"
#include "support.h"

namespace fcn_kernels {

constexpr int64_t BLOCK_BYTES = 256 << 10;  // of packed bank rows, which stay in L2 while rows pass
constexpr int64_t WALK_BYTES = 8 << 20;     // of a walk's packed rows, and of its entries
constexpr int64_t MOST_ROWS = 2048;         // of a walk: the bank is packed once for them
constexpr int64_t LEAST_SHARE = 128;        // rows of a walk below which packing the bank costs more than they do
constexpr int64_t FEW = TILE_ROWS / 3;      // rows for which packing the bank costs more than it saves
constexpr int64_t SEGMENT = 4096;           // bank rows whose moments are summed by themselves: parts have whole ones

struct Statistics {
    Acc *mean, *std;
    int64_t *counts, *indices;
};

class Walk {
  public:
    Walk(const Call& call, int64_t first, int64_t rows, int64_t begin, int64_t end)
        : call(call), first(first), rows(rows), begin(begin), end(end) {
        if (call.k)
            nearest.reset(new Nearest(rows, call.k, Nearest::room_for(call.k, end - begin), Acc(call.least)));
        else
            moments.resize(rows * segments());
    }

    void run() {
        int64_t at = begin;
        if (has_filter(call)) at = filter(call, first, rows, begin, end, *nearest);
        if (at < end) run_exactly(at);
    }

    std::unique_ptr<Nearest> nearest;
    std::vector<Moments> moments;  // [segment][row]

    int64_t segments() const { return (end - begin + SEGMENT - 1) / SEGMENT; }

    const Call& call;
    const int64_t first, rows, begin, end;

  private:
    // From a bank row on.
    void run_exactly(int64_t from) {
        const int64_t panels = (rows + TILE_ROWS - 1) / TILE_ROWS, size = TILE_BANK * call.dim;
        const int64_t block = std::max<int64_t>(1, BLOCK_BYTES / int64_t(size * sizeof(Acc)));
        const Aligned packed(panels * TILE_ROWS * call.dim), columns(block * size);
        packed.clear();  // what stands for rows that there are not
        columns.clear();
        std::vector<Panel> bank(block);
        for (int64_t t = 0; t < block; ++t) bank[t].columns = columns + t * size;
        pack_rows(call.units + first * call.dim, rows, call.dim, packed);
        if (rows <= FEW) return run_few(from, packed, bank[0]);
        for (int64_t at = from; at < end; at += block * TILE_BANK) {
            const int64_t tiles = std::min(block, (end - at + TILE_BANK - 1) / TILE_BANK);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t j = at + t * TILE_BANK;
                bank[t].pack(call.bank + j * call.stride, call.stride, end - j, call.dim, call.normalized);
            }
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t t = 0; t < tiles; ++t)
                    tile(p * TILE_ROWS, packed + p * TILE_ROWS * call.dim, at + t * TILE_BANK, bank[t]);
        }
    }

    void run_few(int64_t from, const Acc* packed, Panel& bank) {
        alignas(BYTES) Acc scores[TILE_ROWS * TILE_BANK];
        const auto direct = rows == 1 ? multiply_few<1> : multiply_few<FEW>;
        for (int64_t at = from; at < end; at += TILE_BANK) {
            const Row* row = call.bank + at * call.stride;
            if (!direct(packed, bank, row, call.stride, end - at, call.dim, call.normalized, scores)) {
                bank.pack(row, call.stride, end - at, call.dim, call.normalized);
                multiply(rows, packed, bank, call.dim, scores);
            }
            for (int64_t r = 0; r < rows; ++r) keep(r, scores + r * TILE_BANK, at, bank.usable);
        }
    }

    void tile(int64_t row, const Acc* packed, int64_t column, const Panel& bank) {
        alignas(BYTES) Acc scores[TILE_ROWS * TILE_BANK];
        const int64_t used = std::min(TILE_ROWS, rows - row);
        multiply(used, packed, bank, call.dim, scores);
        for (int64_t r = 0; r < used; ++r) keep(row + r, scores + r * TILE_BANK, column, bank.usable);
    }

    void keep(int64_t row, const Acc* scores, int64_t column, const bool* usable) {
        if (!is_usable(call.norms[first + row])) return;
        if (call.k)
            keep_best(row, scores, column, usable);
        else
            keep_moments(row, scores, column, usable);
    }

    bool takes_part(int64_t row, int64_t column, bool usable) const {
        return usable && !(call.ids && call.bank_ids[column] == call.ids[first + row]);
    }

    void keep_best(int64_t row, const Acc* scores, int64_t column, const bool* usable) {
        for (int64_t v = 0; v < TILE_BANK; v += LANES) {
            for (uint32_t bits = above(scores + v, nearest->threshold(row)); bits; bits &= bits - 1) {
                const int64_t j = v + __builtin_ctz(bits);
                if (takes_part(row, column + j, usable[j]) && scores[j] > nearest->threshold(row))
                    nearest->append(row, {scores[j], int32_t(column + j - begin)});
            }
        }
    }

    void keep_moments(int64_t row, const Acc* scores, int64_t column, const bool* usable) {
        Acc members[TILE_BANK];
        int64_t count = 0;
        for (int64_t j = 0; j < TILE_BANK; ++j)
            if (scores[j] >= Acc(call.least) && takes_part(row, column + j, usable[j])) members[count++] = scores[j];
        moments[(column - begin) / SEGMENT * rows + row].add(
            moments_of(count, [&](int64_t i) { return double(members[i]); }));
    }
};

// How rows and bank are cut: into walks of equal numbers of rows, and, where these are fewer than the threads, of parts
// of the bank: whole tiles, or segments where moments are summed.
struct Plan {
    int64_t rows, chunks, part, parts;

    explicit Plan(const Call& call) {
        const int64_t row_bytes = call.dim * int64_t(sizeof(Acc));
        const int64_t room = has_filter(call) ? room_of_filter(call.k) : Nearest::room_for(call.k, call.m);
        const int64_t entry_bytes = call.k ? room * int64_t(sizeof(Entry)) : 1;
        const int64_t most = std::clamp(WALK_BYTES / std::max(row_bytes, entry_bytes), TILE_ROWS, MOST_ROWS);
        chunks = std::max((call.n + most - 1) / most, std::min(call.threads, call.n / LEAST_SHARE));
        chunks = std::max<int64_t>(1, chunks);
        if (chunks > call.threads) chunks = (chunks + call.threads - 1) / call.threads * call.threads;
        rows = std::max<int64_t>(1, (call.n + chunks - 1) / chunks);
        rows = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        chunks = (call.n + rows - 1) / rows;
        const int64_t unit = call.k ? TILE_BANK : SEGMENT;
        const int64_t all = std::max<int64_t>(1, (call.m + unit - 1) / unit);
        parts = std::clamp<int64_t>(chunks ? call.threads / chunks : 1, 1, all);
        part = (all + parts - 1) / parts;
        part = std::min<int64_t>(part, (int64_t(1) << 31) / unit - 1) * unit;  // places in it are of 32 bits
        parts = std::max<int64_t>(1, (call.m + part - 1) / part);
    }
};

// What the walks of one row's parts found, together.
class Result {
  public:
    Result(const Call& call, const Statistics& out) : call(call), out(out) {}

    void write(const std::unique_ptr<Walk>* walks, int64_t parts, int64_t row) const {
        const int64_t at = walks[0]->first + row;
        const Moments m = call.k ? nearest(walks, parts, row, at) : all(walks, parts, row);
        out.mean[at] = Acc(m.mean);
        out.std[at] = m.count ? Acc(std::sqrt(m.squares / double(m.count))) : 0;
        out.counts[at] = m.count;
    }

  private:
    const Call& call;
    const Statistics& out;

    Moments nearest(const std::unique_ptr<Walk>* walks, int64_t parts, int64_t row, int64_t at) const {
        std::vector<Acc> scores(call.k), merged;
        std::vector<int64_t> merged_places;
        int64_t* places = out.indices + at * call.k;
        int64_t count = 0;
        for (int64_t part = 0; part < parts; ++part) {  // what is found so far has lower places, and wins ties
            Nearest& found = *walks[part]->nearest;
            const Entry* entry = found.sorted(row);
            const Entry* const last = entry + found.size(row);
            merged.assign(scores.begin(), scores.begin() + count);
            merged_places.assign(places, places + count);
            const int64_t before = count;
            count = 0;
            for (int64_t i = 0; count < call.k && (i < before || entry != last);) {
                const bool old = entry == last || (i < before && merged[i] >= entry->score);
                scores[count] = old ? merged[i] : entry->score;
                places[count++] = old ? merged_places[i] : walks[part]->begin + entry->place;
                old ? void(++i) : void(++entry);
            }
        }
        std::fill(places + count, places + call.k, -1);
        return moments_of(count, [&](int64_t i) { return double(scores[i]); });
    }

    Moments all(const std::unique_ptr<Walk>* walks, int64_t parts, int64_t row) const {
        Moments sum;
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t s = 0; s < walks[part]->segments(); ++s)
                sum.add(walks[part]->moments[s * walks[part]->rows + row]);
        return sum;
    }
};

inline void forward(const Call& call, const Statistics& out) {
    const Plan plan(call);
    Caught caught;
    if (plan.parts == 1) {  // a walk's room is free again after it
#pragma omp parallel for schedule(dynamic) num_threads(std::min(call.threads, std::max<int64_t>(1, plan.chunks)))
        for (int64_t c = 0; c < plan.chunks; ++c)
            caught.run([&] {
                const int64_t first = c * plan.rows;
                const std::unique_ptr<Walk> walk(new Walk(call, first, std::min(plan.rows, call.n - first), 0, call.m));
                walk->run();
                for (int64_t row = 0; row < walk->rows; ++row) Result(call, out).write(&walk, 1, row);
            });
        return caught.rethrow();
    }
    std::vector<std::unique_ptr<Walk>> walks(plan.chunks * plan.parts);
#pragma omp parallel for schedule(dynamic) num_threads(call.threads)
    for (int64_t w = 0; w < int64_t(walks.size()); ++w)
        caught.run([&] {
            const int64_t first = w / plan.parts * plan.rows, begin = w % plan.parts * plan.part;
            walks[w].reset(
                new Walk(call, first, std::min(plan.rows, call.n - first), begin, std::min(begin + plan.part, call.m)));
            walks[w]->run();
        });
    caught.rethrow();
    for (int64_t c = 0; c < plan.chunks; ++c)
        for (int64_t row = 0; row < walks[c * plan.parts]->rows; ++row)
            Result(call, out).write(&walks[c * plan.parts], plan.parts, row);
}

}  // namespace fcn_kernels
