// Rows and their tokens, added up by their shares. A chunk's rows are added one after another within a segment, and its
// segments one after another.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "batch.h"
#include "calls.h"

namespace fcn_kernels {

constexpr int64_t SEGMENT = 256;  // rows
constexpr int RUN = 4;            // rows, and centers, at a time: a sum is then read and written a quarter as often

// Up to RUN rows on their way into the sums of a chunk's centers.
struct Weighted {
    const Row* rows[RUN];
    const Acc* tokens[RUN];
    const Acc* shares[RUN];  // (M,)
    Acc scale[RUN];
    int count = 0;
};

// Sums (M, stride) of `dim` columns, of centers [first, first + CENTERS). columns(r, c, n): n columns of row r from c.
template <int CENTERS, class Columns>
inline void add_weighted(const Weighted& w, const Acc* scale, int64_t first, int64_t dim, Acc* sums, int64_t stride,
                         Columns columns) {
    Acc weights[CENTERS][RUN];
    for (int m = 0; m < CENTERS; ++m)
        for (int r = 0; r < w.count; ++r) weights[m][r] = w.shares[r][first + m] * (scale ? scale[r] : Acc(1));
    for (int64_t c = 0; c < dim; c += LANES) {
        Vec sum[CENTERS];
        for (int m = 0; m < CENTERS; ++m) sum[m] = load_work(sums + (first + m) * stride + c);
        for (int r = 0; r < w.count; ++r) {
            const Vec x = columns(r, c, std::min<int64_t>(LANES, dim - c));
            for (int m = 0; m < CENTERS; ++m) sum[m] += weights[m][r] * x;
        }
        for (int m = 0; m < CENTERS; ++m) store_work(sums + (first + m) * stride + c, sum[m]);
    }
}

template <class Columns>
inline void add_to_all(const Weighted& w, const Acc* scale, int64_t centers, int64_t dim, Acc* sums, int64_t stride,
                       Columns columns) {
    int64_t m = 0;
    for (; m + RUN <= centers; m += RUN) add_weighted<RUN>(w, scale, m, dim, sums, stride, columns);
    for (; m < centers; ++m) add_weighted<1>(w, scale, m, dim, sums, stride, columns);
}

// Sums of a segment: (M, C), (M, d) and (M,), rows padded to vectors.
struct Partial {
    Acc *sums, *key_sums, *masses;

    Partial(const Call& c, Acc* from)
        : sums(from), key_sums(sums + c.clusters * padded(c.width)), masses(key_sums + c.clusters * padded(c.dim)) {}
    static int64_t size(const Call& c) { return c.clusters * (padded(c.width) + padded(c.dim)) + padded(c.clusters); }
};

inline void add_run(const Call& call, const Weighted& w, const Partial& to) {
    add_to_all(w, w.scale, call.clusters, call.width, to.sums, padded(call.width), [&](int r, int64_t c, int64_t n) {
        return n == LANES ? load(w.rows[r] + c) : load_part(w.rows[r] + c, n);
    });
    add_to_all(w, nullptr, call.clusters, call.dim, to.key_sums, padded(call.dim),
               [&](int r, int64_t c, int64_t) { return load_work(w.tokens[r] + c); });
    for (int r = 0; r < w.count; ++r)
        for (int64_t m = 0; m < call.clusters; ++m) to.masses[m] += w.shares[r][m];
}

// Tokens [first, last) of a batch, rows of one chunk; keys (tokens, stride).
inline void add_segment(const Call& call, const Batch& b, const Acc* keys, int64_t stride, const Acc* shares,
                        int64_t first, int64_t last, const Partial& to) {
    Weighted w;
    for (int64_t t = first; t < last; ++t) {
        const int64_t row = b.rows[t];
        const Acc inverse = 1 / (b.norms[t] + EPS_NORM);
        w.rows[w.count] = call.features + row * call.stride;
        w.tokens[w.count] = keys + t * stride;
        w.shares[w.count] = shares + row * call.clusters;
        w.scale[w.count++] = call.quality ? b.norms[t] * inverse : inverse;
        if (w.count == RUN || t + 1 == last) add_run(call, w, to), w.count = 0;
    }
}

// What chunks [begin, end) give; those without rows, 0.
inline void add_up(const Call& call, const Batch& b, const Acc* keys, int64_t stride, const Clustered& out,
                   int64_t begin, int64_t end, int64_t threads) {
    const int64_t m = call.clusters;
    std::vector<int64_t> first(1, 0), chunk_of;
    for (const Chunk& chunk : b.chunks) {
        first.push_back(first.back() + (chunk.rows + SEGMENT - 1) / SEGMENT);
        chunk_of.resize(first.back(), first.size() - 2);
    }
    const Aligned partials(first.back() * Partial::size(call));
    partials.clear();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t s = 0; s < first.back(); ++s) {
        const Chunk& chunk = b.chunks[chunk_of[s]];
        const int64_t at = (s - first[chunk_of[s]]) * SEGMENT;
        add_segment(call, b, keys, stride, out.shares, chunk.first + at,
                    chunk.first + std::min(at + SEGMENT, chunk.rows),
                    Partial(call, partials + s * Partial::size(call)));
    }
    std::fill(out.sums + begin * m * call.width, out.sums + end * m * call.width, Acc(0));
    std::fill(out.key_sums + begin * m * call.dim, out.key_sums + end * m * call.dim, Acc(0));
    std::fill(out.masses + begin * m, out.masses + end * m, Acc(0));
    std::fill(out.counts + begin, out.counts + end, 0);
    for (size_t i = 0; i < b.chunks.size(); ++i) {
        const int64_t place = b.chunks[i].place * m;
        out.counts[b.chunks[i].place] = b.chunks[i].rows;
        for (int64_t s = first[i]; s < first[i + 1]; ++s) {
            const Partial part(call, partials + s * Partial::size(call));
            for (int64_t k = 0; k < m; ++k) {
                Acc* sums = out.sums + (place + k) * call.width;
                Acc* key_sums = out.key_sums + (place + k) * call.dim;
                for (int64_t c = 0; c < call.width; ++c) sums[c] += part.sums[k * padded(call.width) + c];
                for (int64_t c = 0; c < call.dim; ++c) key_sums[c] += part.key_sums[k * padded(call.dim) + c];
                out.masses[place + k] += part.masses[k];
            }
        }
    }
}

}  // namespace fcn_kernels
