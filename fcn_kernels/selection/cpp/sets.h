// A call, its sets, and how they are spread over threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "calls.h"
#include "columns.h"
#include "scratch.h"
#include "team.h"

namespace fcn_kernels {

// What a thread takes of a large set: enough rows to be worth it, few enough blocks that a sum of C columns for each
// costs little beside the rows.
constexpr int64_t BLOCK_ROWS = 128, BLOCK_ELEMENTS = 8192, MOST_BLOCKS = 256;
// A set is shared where it is more than this part of what a thread gets of all the rows.
constexpr int64_t PARTS_A_THREAD = 4;

// The other processes that have rows of the same sets; see ranks.py. Both functions wait for all of them, and return 0
// unless the call has to end.
struct Ranks {
    const int64_t* first;       // (B,), the rows of each set that are before ours
    uint8_t *ballot, *ballots;  // ours, and after a call of `agree` those of all, one after another
    int64_t world, size;        // of how many processes, and the bytes of a ballot
    int (*pool)(double* rows);  // how many can be picked, their least and greatest quality: ours, then of all
    int (*agree)();
};

// What a process proposes as a pick, of its rows; the row itself follows it.
struct Ballot {
    Acc score, distance;
    int64_t row;  // in the set; -1: none
};

// Pointers are null for what is not given. R counts the rows of all sets, padding too; see problem.py.
struct Call {
    const Row* features;                   // rows of C adjacent elements
    const Acc* quality;                    // (R,)
    const Acc* gamma;                      // 0-d
    const Acc* tau;                        // 0-d
    const Acc* noise;                      // (K, R)
    const int64_t* seed;                   // 0-d
    const int64_t* start;                  // (B,)
    const uint8_t* mask;                   // (R,)
    const int64_t* lengths;                // (B,)
    const int64_t* cu_seqlens;             // (B + 1,)
    const int64_t* limits;                 // (B,)
    const Acc* min_distances;              // (R,)
    const Ranks* ranks;                    // null unless the sets have rows elsewhere, too
    int64_t sets, rows, all_rows, dim, k;  // B, N (of padded sets), R, C, K
    int64_t set_stride, row_stride;        // elements
    int64_t normalized, distinct, euclidean, threads;
    double distance_scale;
};

struct Selected {  // of problem.py; the last two and the three before them are null where they are not asked for
    Row* features;
    Acc* distances;
    int64_t *indices, *counts;
    Acc *softmax, *gaps, *norms;
    Acc* least;
    int64_t* nearest;
};

struct Set {
    const Call& call;
    int64_t number, at, n;  // at: its first row among all R
    const Row* first;
    Team* team;                         // that shares it, or null
    std::pmr::memory_resource* memory;  // for what lasts no longer than the work on it; not for several threads

    Set(const Call& call, int64_t number, Team* team = nullptr,
        std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : call(call), number(number), team(team), memory(memory) {
        // Compiled calls do not look at these values; whatever they say, it stays inside the tensors.
        const auto within = [](int64_t value, int64_t most) { return std::clamp<int64_t>(value, 0, most); };
        if (call.cu_seqlens) {
            at = within(call.cu_seqlens[number], call.all_rows);
            n = std::max<int64_t>(within(call.cu_seqlens[number + 1], call.all_rows) - at, 0);
            first = call.features + at * call.row_stride;
        } else {
            at = number * call.rows;
            n = call.lengths ? within(call.lengths[number], call.rows) : call.rows;
            first = call.features + number * call.set_stride;
        }
    }

    const Row* row(int64_t i) const { return first + i * call.row_stride; }
    int64_t rows_before() const { return call.ranks ? call.ranks->first[number] : 0; }
    int64_t picks() const { return call.limits ? std::clamp<int64_t>(call.limits[number], 0, call.k) : call.k; }
    // Rows of its share of the R, beyond those that take part.
    int64_t padding() const { return call.cu_seqlens ? 0 : call.rows - n; }
    int64_t block_rows() const {
        const int64_t least = std::max({BLOCK_ROWS, BLOCK_ELEMENTS / call.dim, (n + MOST_BLOCKS - 1) / MOST_BLOCKS});
        return (least + 63) / 64 * 64;  // whole vectors, whatever the type
    }
    int64_t blocks() const { return (n + block_rows() - 1) / block_rows(); }

    // work(block, its first row, its end) for all blocks.
    template <class Work>
    void for_blocks(Work work) const {
        const int64_t size = block_rows(), count = blocks();
        const auto one = [&](int64_t b) { work(b, b * size, std::min(n, (b + 1) * size)); };
        if (team) return team->for_each(count, one);
        for (int64_t b = 0; b < count; ++b) one(b);
    }

    // The sum of what part(first row, end) is over the blocks.
    template <class Part>
    double sum_of_blocks(Part part) const {
        std::pmr::vector<double> parts(blocks(), memory);
        for_blocks([&](int64_t b, int64_t begin, int64_t end) { parts[b] = part(begin, end); });
        return std::accumulate(parts.begin(), parts.end(), 0.0);
    }

    // The sum of what part(row) is over the rows, by blocks.
    template <class Part>
    double sum(Part part) const {
        return sum_of_blocks([&](int64_t begin, int64_t end) {
            double total = 0;
            for (int64_t i = begin; i < end; ++i) total += part(i);
            return total;
        });
    }
};

template <class Work>
void for_sets(const Call& call, Work work) {
    const auto is_shared = [&](int64_t b) {
        const int64_t n = Set(call, b).n;
        return call.threads > 1 && n * call.dim >= LEAST_SHARED && n * PARTS_A_THREAD * call.threads > call.all_rows;
    };
    const auto run = [&](int64_t b, Team* team) {
        Scratch scratch;
        work(Set(call, b, team, &scratch));
    };
    int64_t shared = 0;
    for (int64_t b = 0; b < call.sets; ++b) shared += is_shared(b);
    if (call.ranks)  // all processes come to a set at the same time
        return Team::run(call.all_rows * call.dim < LEAST_SHARED ? 1 : call.threads, [&](Team& team) {
            for (int64_t b = 0; b < call.sets; ++b) work(Set(call, b, &team));
        });
    const bool few = call.all_rows * call.dim < LEAST_SHARED || call.sets == 1;
    Team::run(few && shared == 0 ? 1 : call.threads, [&](Team& team) {
        for (int64_t b = 0; shared && b < call.sets; ++b)
            if (is_shared(b)) run(b, &team);
        if (shared == call.sets) return;
        team.for_each(call.sets, [&](int64_t b) {
            if (!is_shared(b)) run(b, nullptr);
        });
    });
}

}  // namespace fcn_kernels
