// Attention of one head: queries lie in lanes, so that no sum crosses them, and keys pass in blocks from the chunk's
// first on. What a query gets depends on its chunk alone.

#pragma once

#include <algorithm>
#include <cstdint>

#include "aligned.h"
#include "numbers.h"

namespace fcn_kernels {

constexpr int64_t GROUPS = 2, QUERIES = GROUPS * LANES;  // at a time
constexpr int64_t BLOCK_KEYS = 64;                       // whose scores stay in L1
constexpr int64_t TILE_KEYS = 4;
constexpr int64_t TILE_CHANNELS = BYTES == 64 ? 8 : 4;

inline int64_t whole_channels(int64_t width) { return (width + TILE_CHANNELS - 1) / TILE_CHANNELS * TILE_CHANNELS; }

// A chunk's keys and values of one head: (count, width), width whole tiles of channels. TILE_KEYS more can be read.
struct Head {
    const Acc *keys, *values;
    int64_t count, width;
};

// Of some queries on the way; [..][QUERIES].
struct Attending {
    explicit Attending(int64_t width) : queries(width * QUERIES), out(width * QUERIES), scores(BLOCK_KEYS * QUERIES) {
        queries.clear();
    }

    const Aligned queries, out, scores;
    Vec top[GROUPS], total[GROUPS], shrink[GROUPS];
};

template <int USED>
inline void score_keys(const Head& h, int64_t first, int64_t count, Attending& a, Vec (&peak)[GROUPS]) {
    for (int64_t j = 0; j < count; j += TILE_KEYS) {
        const Acc* keys = h.keys + (first + j) * h.width;
        Vec scores[TILE_KEYS][USED] = {};
        for (int64_t c = 0; c < h.width; ++c) {
#pragma GCC unroll 4
            for (int k = 0; k < TILE_KEYS; ++k)
                for (int g = 0; g < USED; ++g)
                    scores[k][g] += keys[k * h.width + c] * load_work(a.queries + c * QUERIES + g * LANES);
        }
#pragma GCC unroll 4
        for (int k = 0; k < TILE_KEYS; ++k)
            for (int g = 0; g < USED; ++g) {
                if (j + k < count) peak[g] = larger(peak[g], scores[k][g]);
                store_work(a.scores + (j + k) * QUERIES + g * LANES, scores[k][g]);
            }
    }
}

// Scores to shares, before they are divided by their total.
template <int USED>
inline void share_keys(int64_t count, Attending& a, const Vec (&peak)[GROUPS]) {
    for (int g = 0; g < USED; ++g) {
        a.shrink[g] = exponential(a.top[g] - peak[g]);
        a.total[g] *= a.shrink[g];
        a.top[g] = peak[g];
    }
    for (int64_t j = 0; j < count; ++j)
        for (int g = 0; g < USED; ++g) {
            Acc* at = a.scores + j * QUERIES + g * LANES;
            const Vec share = exponential(load_work(at) - a.top[g]);
            a.total[g] += share;
            store_work(at, share);
        }
}

template <int USED>
inline void gather_values(const Head& h, int64_t first, int64_t count, Attending& a) {
    for (int64_t begin = 0; begin < h.width; begin += TILE_CHANNELS) {
        const Acc* values = h.values + first * h.width + begin;
        Acc* out = a.out + begin * QUERIES;
        Vec sums[TILE_CHANNELS][USED];
        for (int c = 0; c < TILE_CHANNELS; ++c)
            for (int g = 0; g < USED; ++g) sums[c][g] = load_work(out + c * QUERIES + g * LANES) * a.shrink[g];
        for (int64_t j = 0; j < count; ++j) {
            Vec share[USED];
            for (int g = 0; g < USED; ++g) share[g] = load_work(a.scores + j * QUERIES + g * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < TILE_CHANNELS; ++c)
                for (int g = 0; g < USED; ++g) sums[c][g] += values[j * h.width + c] * share[g];
        }
        for (int c = 0; c < TILE_CHANNELS; ++c)
            for (int g = 0; g < USED; ++g) store_work(out + c * QUERIES + g * LANES, sums[c][g]);
    }
}

template <int USED>
inline void attend_lanes(const Head& h, Attending& a) {
    for (int g = 0; g < USED; ++g) a.top[g] = fill(-INFINITE), a.total[g] = Vec{};
    std::fill_n(a.out + 0, h.width * QUERIES, Acc(0));
    for (int64_t first = 0; first < h.count; first += BLOCK_KEYS) {
        const int64_t count = std::min(BLOCK_KEYS, h.count - first);
        Vec peak[GROUPS];
        for (int g = 0; g < USED; ++g) peak[g] = a.top[g];
        score_keys<USED>(h, first, count, a, peak);
        share_keys<USED>(count, a, peak);
        gather_values<USED>(h, first, count, a);
    }
}

// out = softmax(queries keys^T) values for up to QUERIES queries, rows by strides of which `width` columns are used.
inline void attend(const Head& h, const Acc* queries, int64_t stride, int64_t count, int64_t width, Attending& a,
                   Acc* out, int64_t out_stride) {
    for (int64_t q = 0; q < count; ++q)
        for (int64_t c = 0; c < width; ++c) a.queries[c * QUERIES + q] = queries[q * stride + c];
    count <= LANES ? attend_lanes<1>(h, a) : attend_lanes<GROUPS>(h, a);
    for (int64_t c = 0; c < width; ++c)
        for (int g = 0; g < GROUPS; ++g) {
            Acc* at = a.out + c * QUERIES + g * LANES;
            if (g * LANES < count) store_work(at, load_work(at) / a.total[g]);
        }
    for (int64_t q = 0; q < count; ++q)
        for (int64_t c = 0; c < width; ++c) out[q * out_stride + c] = a.out[c * QUERIES + q];
}

}  // namespace fcn_kernels
