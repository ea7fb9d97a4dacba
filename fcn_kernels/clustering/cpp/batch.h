// A call as problem.py has it, and the tokens of some of its chunks.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace fcn_kernels {

// Pointers are null for what is not given. Weights are (L, inputs, outputs).
struct Call {
    const Row* features;  // (T, C)
    const Acc *quality, *styles;
    const uint8_t* valid;
    const Acc *table, *edges, *centers;  // (61, p), (60,), (M, d)
    const Acc *qkv_weight, *qkv_bias, *proj_weight, *proj_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    const Acc *qkv_panels, *proj_panels, *fc1_panels, *fc2_panels;  // (L, ..) of the weights, or null
    const Acc *weight, *bias;                                       // (d, M), (M,)
    const Acc* residual;                                            // (L, 2, P)
    const int64_t *offsets, *lengths;                               // (P + 1,), (P,)
    int64_t rows, chunks, width, stride, dim, coded, clusters, depth, heads, threads;
};

struct Clustered {
    Acc *sums, *key_sums, *masses, *shares;
    int64_t* counts;
    Acc* hidden;  // (L, T + P M, d)
};

constexpr Acc EPS_NORM = 1e-5f;
constexpr int64_t EDGES = 60;

// Rows [begin, end) of a chunk. Compiled calls do not look at these values; whatever they say, it stays inside the
// tensors.
struct Span {
    int64_t begin, end;

    Span(const Call& c, int64_t chunk) {
        const auto within = [&](int64_t value) { return std::clamp<int64_t>(value, 0, c.rows); };
        begin = within(c.offsets[chunk]);
        const int64_t owned = std::max<int64_t>(within(c.offsets[chunk + 1]) - begin, 0);
        end = begin + std::clamp<int64_t>(c.lengths[chunk], 0, owned);
    }
    int64_t size() const { return end - begin; }
};

struct Chunk {
    int64_t place;        // among all
    int64_t first, rows;  // tokens: its rows, then the centers
};

// A row that takes part. NaN is not.
inline Acc norm_or_nan(const Call& c, int64_t row) {
    constexpr Acc NOT_A_NUMBER = std::numeric_limits<Acc>::quiet_NaN();
    const Row* x = c.features + row * c.stride;
    Acc norm, others = 0;
    if (c.quality) {
        Vec zeros = {};  // times 0, what is not finite is NaN
        for_columns(x, c.width, [&](Vec value, int64_t, int) { zeros += value * Acc(0); });
        norm = c.quality[row], others = sum_of_lanes(zeros);
    } else {
        norm = norm_of(x, c.width);
    }
    for (int64_t i = 0; c.styles && i < c.dim - c.coded; ++i) others += c.styles[row * (c.dim - c.coded) + i] * Acc(0);
    return norm >= 0 && norm < INFINITE && others == 0 ? norm : NOT_A_NUMBER;
}

// Tokens of chunks that go through the blocks together.
class Batch {
  public:
    std::vector<Chunk> chunks;
    std::vector<int64_t> rows;          // of each token, -1 for centers
    std::vector<int64_t> chunk_of;      // of each token, in `chunks`
    std::vector<Acc> norms;             // of each token, 0 for centers
    std::vector<int64_t> every, taken;  // all tokens, and those that are rows

    // Chunks [begin, end) of a call.
    Batch(const Call& call, int64_t begin, int64_t end, int64_t threads) {
        std::vector<int64_t> given, first(1, 0);
        for (int64_t p = begin; p < end; ++p) {
            const Span span(call, p);
            for (int64_t row = span.begin; row < span.end; ++row)
                if (!call.valid || call.valid[row]) given.push_back(row);
            first.push_back(given.size());
        }
        std::vector<Acc> found(given.size());
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < int64_t(given.size()); ++i) found[i] = norm_or_nan(call, given[i]);
        for (int64_t p = begin; p < end; ++p) {
            const int64_t start = rows.size();
            for (int64_t i = first[p - begin]; i < first[p - begin + 1]; ++i)
                if (found[i] >= 0) add(given[i], found[i]), taken.push_back(rows.size() - 1);
            const int64_t count = rows.size() - start;
            for (int64_t m = 0; count && m < call.clusters; ++m) add(-1, 0);
            if (count) chunks.push_back({p, start, count});
        }
        for (int64_t t = 0; t < int64_t(rows.size()); ++t) every.push_back(t);
    }

    int64_t tokens() const { return rows.size(); }

  private:
    void add(int64_t row, Acc norm) {
        rows.push_back(row);
        norms.push_back(norm);
        chunk_of.push_back(chunks.size());
    }
};

}  // namespace fcn_kernels
