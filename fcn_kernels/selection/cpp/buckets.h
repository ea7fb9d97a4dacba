// Many points, near ones side by side, so that a step meets only those that its pick can be nearest to.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "points.h"

namespace fcn_kernels {

// Points along a Z-order curve (Morton 1966), cut into buckets of ROWS. A pick that is at least as far from a bucket's
// box as the bucket's farthest row is from the picks before changes nothing in it. Everything else is compared as
// Points compares it, to the last bit.
class Buckets {
  public:
    static constexpr int64_t ROWS = 64, LEAST_ROWS = 4096;  // of a bucket; and for which it is worth to make them

    // Of the rows that are not barred.
    Buckets(const Points& points, int64_t rows, const uint8_t* barred, const Acc* least, const Acc* weight)
        : dim(points.dim) {
        const std::vector<uint64_t> keys = sorted_keys(points, rows, barred);
        const int64_t all = keys.size();
        count = (all + ROWS - 1) / ROWS;
        stride = count * ROWS;
        boxes = padded(count);
        columns.resize(dim * stride);
        lows.resize(dim * boxes);
        highs.resize(dim * boxes);
        logits.assign(stride, -1);
        weights.resize(stride);
        order.resize(stride);
        farthest_in.assign(boxes, -1);
        lightest.resize(boxes);
        for (int64_t s = 0; s < stride; ++s) {  // the last row again and again, which can never be picked there
            const int64_t i = order[s] = int32_t(keys[std::min(s, all - 1)]);
            if (s < all) logits[s] = least[i];
            weights[s] = weight[i];
            for (int64_t c = 0; c < dim; ++c) columns[c * stride + s] = points.at(i, c);
        }
        for (int64_t b = 0; b < count; ++b) bound(b);
    }

    // Meets a pick; changed(row) for each row that it is nearer to than what was picked before.
    template <class Changed>
    void meet(const Acc* point, Changed changed) {
        const Acc safe = 1 - 64 * std::numeric_limits<Acc>::epsilon();  // no rounding may pass over a row
        const Vec most = Vec{} + std::numeric_limits<Acc>::max(), zero = {};
        for (int64_t b = 0; b < boxes; b += LANES) {
            Vec apart = {};
            for (int64_t c = 0; c < dim; ++c) {
                const Vec below = load_work(&lows[c * boxes + b]) - point[c];
                const Vec above = point[c] - load_work(&highs[c * boxes + b]);
                const Vec outside = below > above ? below : above;
                apart += outside > zero ? outside * outside : zero;
            }
            const Vec reach = (apart < most ? apart : most) * load_work(&lightest[b]) * safe;
            const Lanes near = reach < load_work(&farthest_in[b]);
            for (int lane = 0; lane < LANES; ++lane)
                if (near[lane]) meet_bucket(b + lane, point, changed);
        }
    }

    // The farthest row, the lowest of equals; -1 where there is none.
    int64_t farthest(Acc& logit) {
        Vec most = load_work(&farthest_in[0]);
        for (int64_t b = LANES; b < boxes; b += LANES) {
            const Vec next = load_work(&farthest_in[b]);
            most = next > most ? next : most;
        }
        Acc highest = most[0];
        for (int lane = 1; lane < LANES; ++lane) highest = std::max(highest, most[lane]);
        last = -1;
        for (int64_t b = 0; highest >= 0 && b < count; ++b) {
            if (farthest_in[b] != highest) continue;
            for (int64_t s = b * ROWS; s < (b + 1) * ROWS; ++s)
                if (logits[s] == highest && (last < 0 || order[s] < order[last])) last = s;
        }
        if (last < 0) return -1;
        logit = highest;
        return order[last];
    }

    // The row that was found last is not to be found again.
    void take_out() {
        if (last < 0) return;
        logits[last] = -1;
        const Acc* const of_bucket = &logits[last / ROWS * ROWS];
        farthest_in[last / ROWS] = *std::max_element(of_bucket, of_bucket + ROWS);
    }

    void write(Acc* least) const {
        for (int64_t s = 0; s < stride; ++s)
            if (logits[s] >= 0) least[order[s]] = logits[s];
    }

  private:
    int64_t dim, count = 0, stride = 0, boxes = 0, last = -1;
    std::vector<Acc> columns, lows, highs;  // (dim, stride), (dim, boxes)
    std::vector<Acc> logits, weights;       // of rows
    std::vector<int32_t> order;             // their numbers in the set
    std::vector<Acc> farthest_in, lightest;

    // A row's place on the curve, and its number.
    std::vector<uint64_t> sorted_keys(const Points& points, int64_t rows, const uint8_t* barred) const {
        constexpr int64_t MOST_BITS = 10, ALL_BITS = 30;
        const int64_t bits = std::min(MOST_BITS, ALL_BITS / dim);
        std::vector<Acc> low(dim, INFINITE), high(dim, -INFINITE);
        std::vector<uint64_t> keys;
        for (int64_t i = 0; i < rows; ++i) {
            if (barred[i]) continue;
            keys.push_back(uint64_t(i));
            for (int64_t c = 0; c < dim; ++c) {
                low[c] = std::min(low[c], points.at(i, c));
                high[c] = std::max(high[c], points.at(i, c));
            }
        }
        for (uint64_t& key : keys) {
            uint32_t cell[Points::MOST_DIM];
            uint64_t code = 0;
            for (int64_t c = 0; c < dim; ++c) {
                const Acc share = (points.at(int64_t(key), c) - low[c]) / (high[c] - low[c]);  // NaN where all is one
                cell[c] = share > 0 ? uint32_t(std::min<Acc>(share, 1) * Acc((1 << bits) - 1)) : 0;
            }
            for (int64_t bit = bits - 1; bit >= 0; --bit)
                for (int64_t c = 0; c < dim; ++c) code = code << 1 | (cell[c] >> bit & 1);
            key |= code << 32;
        }
        std::sort(keys.begin(), keys.end());
        return keys;
    }

    void bound(int64_t b) {
        const int64_t first = b * ROWS, end = first + ROWS;
        for (int64_t c = 0; c < dim; ++c) {
            const Acc* const column = &columns[c * stride];
            lows[c * boxes + b] = *std::min_element(column + first, column + end);
            highs[c * boxes + b] = *std::max_element(column + first, column + end);
        }
        lightest[b] = *std::min_element(&weights[first], &weights[first] + ROWS);
        farthest_in[b] = *std::max_element(&logits[first], &logits[first] + ROWS);
    }

    template <class Changed>
    void meet_bucket(int64_t b, const Acc* point, Changed changed) {
        Acc* const of_logits = logits.data();
        const Acc* const of_weights = weights.data();
        Vec highest = Vec{} - 1;
        squared_distances(dim, columns.data(), stride, b * ROWS, (b + 1) * ROWS, point, [&](Vec squares, int64_t s) {
            const Vec old = load_work(of_logits + s), distance = squares * load_work(of_weights + s);
            const Vec now = old <= distance ? old : distance;
            store_work(of_logits + s, now);
            highest = now > highest ? now : highest;
            for (int lane = 0; lane < LANES; ++lane)
                if (now[lane] < old[lane]) changed(order[s + lane]);
        });
        Acc top = -1;
        for (int lane = 0; lane < LANES; ++lane) top = std::max(top, highest[lane]);
        farthest_in[b] = top;
    }
};

}  // namespace fcn_kernels
