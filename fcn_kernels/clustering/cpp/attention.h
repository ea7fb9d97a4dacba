// Attention of one head: queries lie in lanes, so that no sum crosses them, and keys pass in blocks from the chunk's
// first on. What a query gets depends on its chunk alone.
//
// Shares are 2^score, without the largest score taken away first: float32's range is wide enough. Where a query's
// scores would leave it, they are moved by the largest so far. So a score takes no more than its products and 2^x.

#pragma once

#include <algorithm>
#include <cstdint>

#include "aligned.h"
#include "numbers.h"
#include "transpose.h"

namespace fcn_kernels {

constexpr int64_t GROUPS = 2, QUERIES = GROUPS * LANES;  // at a time
constexpr int64_t BLOCK_KEYS = 128;                      // whose shares stay in L1
constexpr int64_t TILE_KEYS = BYTES == 64 ? 8 : 4;
constexpr int64_t TILE_CHANNELS = BYTES == 64 ? 8 : 4;
constexpr Acc MOST_SCORE = 60;  // sums of shares of 2^60 are far from the range's end

inline int64_t whole_channels(int64_t width) { return (width + TILE_CHANNELS - 1) / TILE_CHANNELS * TILE_CHANNELS; }

// A chunk's keys and values of one head: (count, width), width whole tiles of channels. TILE_KEYS more can be read.
struct Head {
    const Acc *keys, *values;
    int64_t count, width;
};

// Of some queries on the way; [..][QUERIES].
struct Attending {
    explicit Attending(int64_t width) : queries(width * QUERIES), out(width * QUERIES), shares(BLOCK_KEYS * QUERIES) {
        queries.clear();
    }

    const Aligned queries, out, shares;
    Vec shift[GROUPS], total[GROUPS];  // what is added to scores; sums of shares
};

// Of a block of keys.
template <int USED>
struct Scored {
    Vec peak[USED], total[USED];
};

// Shares of keys [first, first + count), before they are divided by their total.
template <int USED>
inline Scored<USED> share_keys(const Head& h, int64_t first, int64_t count, const Attending& a) {
    Scored<USED> s;
    for (int g = 0; g < USED; ++g) s.peak[g] = fill(-INFINITE), s.total[g] = Vec{};
    for (int64_t j = 0; j < count; j += TILE_KEYS) {
        const Acc* keys = h.keys + (first + j) * h.width;
        Vec scores[TILE_KEYS][USED];
        for (int k = 0; k < TILE_KEYS; ++k)
            for (int g = 0; g < USED; ++g) scores[k][g] = a.shift[g];
        for (int64_t c = 0; c < h.width; ++c) {
#pragma GCC unroll 8
            for (int k = 0; k < TILE_KEYS; ++k)
                for (int g = 0; g < USED; ++g)
                    scores[k][g] += keys[k * h.width + c] * load_work(a.queries + c * QUERIES + g * LANES);
        }
        const int64_t some = std::min(TILE_KEYS, count - j);
#pragma GCC unroll 8
        for (int k = 0; k < TILE_KEYS; ++k)
            for (int g = 0; g < USED; ++g) {
                const Vec share = power_of_two(scores[k][g]);
                if (k < some) s.peak[g] = larger(s.peak[g], scores[k][g]), s.total[g] += share;
                store_work(a.shares + (j + k) * QUERIES + g * LANES, share);
            }
    }
    return s;
}

template <int USED>
inline void gather_values(const Head& h, int64_t first, int64_t count, Attending& a) {
    for (int64_t begin = 0; begin < h.width; begin += TILE_CHANNELS) {
        const Acc* values = h.values + first * h.width + begin;
        Acc* out = a.out + begin * QUERIES;
        Vec sums[TILE_CHANNELS][USED];
        for (int c = 0; c < TILE_CHANNELS; ++c)
            for (int g = 0; g < USED; ++g) sums[c][g] = load_work(out + c * QUERIES + g * LANES);
        for (int64_t j = 0; j < count; ++j) {
            Vec share[USED];
            for (int g = 0; g < USED; ++g) share[g] = load_work(a.shares + j * QUERIES + g * LANES);
#pragma GCC unroll 8
            for (int c = 0; c < TILE_CHANNELS; ++c)
                for (int g = 0; g < USED; ++g) sums[c][g] += values[j * h.width + c] * share[g];
        }
        for (int c = 0; c < TILE_CHANNELS; ++c)
            for (int g = 0; g < USED; ++g) store_work(out + c * QUERIES + g * LANES, sums[c][g]);
    }
}

// Where a block's scores would leave the range: its largest becomes 0, and what was gathered is moved along.
template <int USED>
[[gnu::noinline]] bool move_range(const Head& h, bool is_first, Attending& a, const Scored<USED>& s) {
    bool moved = false;
    for (int g = 0; g < USED; ++g) {
        Vec far = s.peak[g] > MOST_SCORE ? s.peak[g] : Vec{};
        if (is_first) far = s.peak[g] < -MOST_SCORE ? s.peak[g] : far;
        for (int lane = 0; lane < LANES; ++lane) moved |= far[lane] != 0;
        a.shift[g] -= far;
        if (is_first) continue;
        const Vec shrink = power_of_two(-far);
        a.total[g] *= shrink;
        for (int64_t c = 0; c < h.width; ++c) {
            Acc* at = a.out + c * QUERIES + g * LANES;
            store_work(at, load_work(at) * shrink);
        }
    }
    return moved;
}

template <int USED>
inline void attend_lanes(const Head& h, Attending& a) {
    for (int g = 0; g < USED; ++g) a.shift[g] = a.total[g] = Vec{};
    std::fill_n(a.out + 0, h.width * QUERIES, Acc(0));
    for (int64_t first = 0; first < h.count; first += BLOCK_KEYS) {
        const int64_t count = std::min(BLOCK_KEYS, h.count - first);
        Scored<USED> s = share_keys<USED>(h, first, count, a);
        Vec most = s.peak[0], least = s.peak[0];
        for (int g = 1; g < USED; ++g) most = larger(most, s.peak[g]), least = -larger(-least, -s.peak[g]);
        if (largest_lane(most) > MOST_SCORE || (first == 0 && largest_lane(-least) > MOST_SCORE)) {
            if (move_range<USED>(h, first == 0, a, s)) s = share_keys<USED>(h, first, count, a);
        }
        for (int g = 0; g < USED; ++g) a.total[g] += s.total[g];
        gather_values<USED>(h, first, count, a);
    }
}

// Rows [count][width] by stride to columns [width][QUERIES], of LANES rows times `factor`; 0 beyond the last row.
inline void to_lanes(const Acc* rows, int64_t stride, int64_t count, int64_t width, Acc factor, Acc* columns) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        Vec square[LANES];
        for (int q = 0; q < LANES; ++q) square[q] = q < count ? load_work(rows + q * stride + c) * factor : Vec{};
        transpose(square);
        for (int i = 0; i < LANES; ++i) store_work(columns + (c + i) * QUERIES, square[i]);
    }
    for (; c < width; ++c)
        for (int q = 0; q < LANES; ++q) columns[c * QUERIES + q] = q < count ? rows[q * stride + c] * factor : Acc(0);
}

// And back, times a factor of each row's own.
inline void from_lanes(const Acc* columns, Vec factor, int64_t count, int64_t width, Acc* rows, int64_t stride) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        Vec square[LANES];
        for (int i = 0; i < LANES; ++i) square[i] = load_work(columns + (c + i) * QUERIES) * factor;
        transpose(square);
        for (int q = 0; q < LANES; ++q)
            if (q < count) store_work(rows + q * stride + c, square[q]);
    }
    for (; c < width; ++c) {
        const Vec column = load_work(columns + c * QUERIES) * factor;
        for (int q = 0; q < count; ++q) rows[q * stride + c] = column[q];
    }
}

// out = softmax(queries keys^T) values for up to QUERIES queries, rows by strides of which `width` columns are used.
inline void attend(const Head& h, const Acc* queries, int64_t stride, int64_t count, int64_t width, Attending& a,
                   Acc* out, int64_t out_stride) {
    constexpr Acc LOG2_E = 1.44269504f;
    for (int64_t q = 0; q < count; q += LANES)
        to_lanes(queries + q * stride, stride, std::min<int64_t>(LANES, count - q), width, LOG2_E, a.queries + q);
    count <= LANES ? attend_lanes<1>(h, a) : attend_lanes<GROUPS>(h, a);
    for (int64_t q = 0; q < count; q += LANES)
        from_lanes(a.out + q, 1 / a.total[q / LANES], std::min<int64_t>(LANES, count - q), width, out + q * out_stride,
                   out_stride);
}

}  // namespace fcn_kernels
