// Selection from one set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "noise.h"

namespace fcn_kernels {

struct Best {
    Acc value = -INFINITE;
    int64_t row = -1;

    bool is_above(Acc other, int64_t i) const { return row >= 0 && (other < value || (other == value && i > row)); }
    void meet(Acc other, int64_t i) {
        if (row < 0 || other > value || (other == value && i < row)) value = other, row = i;
    }
};

// One set's way through the K steps. A row's gap is |x| (1 - max cosine to the picks it met), its logit that times its
// coefficient q^gamma s / |x|; rows of a set that is normalized have 1 for |x|.
class Selection {
  public:
    Selection(const Set& set, const Selected& out)
        : set(set),
          call(set.call),
          out(out),
          keep(out.norms),
          noise(set),
          barred(new uint8_t[set.n]),
          norm(new Acc[set.n]),
          gap(new Acc[set.n]),
          coefficient(new Acc[set.n]),
          met(new int32_t[set.n]),
          quality(call.quality ? call.quality + set.at : norm.get()),
          directions(call.k * padded(call.dim)),
          pick_norms(call.k),
          picks(call.k) {}

    void run() {
        const Best first = first_pick();
        int64_t count = 0, usable = 0;
        Best second;
        if (first.row >= 0) {
            record(0, first.row, INFINITE);
            count = 1;
            if (keep || call.k > 1) usable = meet_first(second);
        }
        if (keep) {
            write_norms(first.row >= 0);
            if (count && !call.start)
                keep_softmax(0, first.row);
            else
                forget(out.softmax);
        }
        for (; count < std::min(call.k, usable); ++count) {
            if (call.distinct) take_out(count - 1);
            int64_t pick = second.row;
            if (keep || count > 1) {
                noise.advance(count);
                pick = farthest(count);
            }
            record(count, pick, gap[pick] * coefficient[pick]);
            if (keep) keep_softmax(count, pick);
        }
        out.counts[set.number] = count;
        for (int64_t step = count; step < call.k; ++step) {
            record(step, -1, 0);
            if (keep && step > 0) forget(out.softmax + step * call.all_rows);
        }
        for (int64_t step = std::max<int64_t>(count - 1, 0); keep && step < call.k - 1; ++step)
            forget(out.gaps + step * call.all_rows);
    }

  private:
    const Set& set;
    const Call& call;
    const Selected& out;
    const bool keep;
    Noise noise;
    std::unique_ptr<uint8_t[]> barred;  // rows that cannot be picked; of these, the rest is not set
    std::unique_ptr<Acc[]> norm, gap, coefficient;
    std::unique_ptr<int32_t[]> met;  // picks that the gap knows of
    const Acc* const quality;
    std::vector<Acc> directions, pick_norms;
    std::vector<int64_t> picks;

    // What a step compares. fma, lest the compiler round differently here and there, and equal rows not be equal.
    Acc noisy(int64_t step, int64_t i) const {
        return step ? std::fma(gap[i], coefficient[i], noise.at(i)) : quality[i] + noise.at(i);
    }

    template <class Scan>
    Best best_of_blocks(Scan scan) const {
        std::vector<Best> found(set.blocks());
        set.for_blocks([&](int64_t b, int64_t begin, int64_t end) { found[b] = scan(begin, end); });
        Best best;
        for (const Best& f : found)
            if (f.row >= 0) best.meet(f.value, f.row);
        return best;
    }

    // Of the highest quality, or the given one. Where the quality is given, rows are read only once the pick is known,
    // so that their norms and their products with it take one pass.
    Best first_pick() {
        bool measure = !call.quality;
        const auto favourite = [&] {
            return best_of_blocks([&](int64_t begin, int64_t end) {
                admit(begin, end, measure);
                Best best;
                for (int64_t i = begin; i < end; ++i)
                    if (!barred[i]) best.meet(noisy(0, i), i);
                return best;
            });
        };
        noise.advance(0);
        const Best best = favourite();
        if (call.start) {
            Best given;
            const int64_t i = call.start[set.number];
            if (i >= 0 && i < set.n && !barred[i] && is_sound(norm[i] = norm_of(set.row(i), call.dim)))
                given.meet(0, i);
            return given;
        }
        if (best.row < 0 || measure) return best;
        if (is_sound(norm[best.row] = norm_of(set.row(best.row), call.dim))) return best;
        measure = true;  // one row that cannot be used may be one of many
        return favourite();
    }

    void admit(int64_t begin, int64_t end, bool measure) {
        for (int64_t i = begin; i < end; ++i)
            barred[i] = (call.mask && !call.mask[set.at + i]) || (call.quality && !is_sound(quality[i]));
        for (int64_t i = begin; measure && i < end; ++i)
            if (!barred[i]) barred[i] = !is_sound(norm[i] = norm_of(set.row(i), call.dim));
    }

    // All rows' norms, coefficients and gaps to the first pick, and in inference the second pick, in one pass. Returns
    // how many rows can be picked. A row that has come from memory for its norm is in cache for the rest.
    int64_t meet_first(Best& second) {
        const Acc gamma = *call.gamma, scale = Acc(call.distance_scale);
        const int64_t taken = call.distinct ? picks[0] : -1;
        std::vector<int64_t> usable(set.blocks());
        if (!keep) noise.advance(1);
        second = best_of_blocks([&](int64_t begin, int64_t end) {
            Best best;
            int64_t count = 0;
            for (int64_t i = begin; i < end; ++i) {
                if (barred[i]) continue;
                norm[i] = norm_of(set.row(i), call.dim);
                if (!is_sound(norm[i])) {
                    barred[i] = true;
                    continue;
                }
                coefficient[i] = std::pow(quality[i], gamma) * scale / (call.normalized ? 1 : norm[i]);
                gap[i] = INFINITE;
                meet(i, 0);
                if (!keep && i != taken) best.meet(noisy(1, i), i);
                ++count;
            }
            usable[begin / set.block_rows()] = count;
            return best;
        });
        return std::accumulate(usable.begin(), usable.end(), int64_t(0));
    }

    void meet(int64_t i, int64_t pick) {
        const Acc along = product(set.row(i), &directions[pick * padded(call.dim)], call.dim);
        const Acc fresh = call.normalized ? 1 - along : norm[i] - along / pick_norms[pick];
        const Acc positive = std::max<Acc>(fresh, 0);  // rounding can take it below a picked row's 0 to itself
        if (keep && pick < call.k - 1) out.gaps[pick * call.all_rows + set.at + i] = positive;
        gap[i] = std::min(gap[i], positive);
        met[i] = pick + 1;
    }

    // Bars a picked row. It meets no further pick, and its gaps to them, which no gradient comes through, are 0.
    void take_out(int64_t step) {
        barred[picks[step]] = true;
        for (int64_t pick = step; keep && pick < call.k - 1; ++pick)
            out.gaps[pick * call.all_rows + set.at + picks[step]] = 0;
    }

    // The pick of a later step. In inference, each block's row of the highest bound meets the picks that it has not met
    // yet, and then the rows whose bounds are above the best of those.
    int64_t farthest(int64_t step) {
        const auto meet_all = [&](int64_t i) {
            for (int64_t pick = met[i]; pick < step; ++pick) meet(i, pick);
        };
        Best so_far;
        if (!keep) {
            so_far = best_of_blocks([&](int64_t begin, int64_t end) {
                Best highest, best;
                for (int64_t i = begin; i < end; ++i)
                    if (!barred[i]) highest.meet(noisy(step, i), i);
                if (highest.row < 0) return best;
                meet_all(highest.row);
                best.meet(noisy(step, highest.row), highest.row);
                return best;
            });
        }
        return best_of_blocks([&](int64_t begin, int64_t end) {
                   Best best = so_far;
                   for (int64_t i = begin; i < end; ++i) {
                       if (barred[i] || (!keep && best.is_above(noisy(step, i), i))) continue;
                       meet_all(i);
                       best.meet(noisy(step, i), i);
                   }
                   return best;
               })
            .row;
    }

    void record(int64_t step, int64_t pick, Acc distance) {
        const int64_t place = set.number * call.k + step;
        Row* const copy = out.features + place * call.dim;
        out.indices[place] = pick;
        out.distances[place] = distance;
        if (pick < 0) {
            std::fill_n(copy, call.dim, Row{});
            return;
        }
        picks[step] = pick;
        pick_norms[step] = norm[pick];
        std::memcpy(copy, set.row(pick), call.dim * sizeof(Row));
        copy_row(set.row(pick), &directions[step * padded(call.dim)], call.dim);
    }

    // softmax(noisy logits / tau) of a step; its pick has the greatest.
    void keep_softmax(int64_t step, int64_t pick) {
        Acc* const y = out.softmax + step * call.all_rows + set.at;
        const Acc greatest = noisy(step, pick), tau = Acc(call.tau);
        const Acc total =
            Acc(set.sum([&](int64_t i) { return y[i] = barred[i] ? 0 : std::exp((noisy(step, i) - greatest) / tau); }));
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) y[i] /= total;
        });
        std::fill_n(y + set.n, set.padding(), Acc(0));
    }

    void forget(Acc* values) { std::fill_n(values + set.at, set.n + set.padding(), Acc(0)); }

    void write_norms(bool any) {
        for (int64_t i = 0; i < set.n; ++i) out.norms[set.at + i] = any && !barred[i] ? norm[i] : -1;
        std::fill_n(out.norms + set.at + set.n, set.padding(), Acc(-1));
    }
};

}  // namespace fcn_kernels
