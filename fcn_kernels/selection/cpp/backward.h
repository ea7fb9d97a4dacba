// The gradient of a selection from one set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "sets.h"
#include "weights.h"

namespace fcn_kernels {

// One set's way back through the steps; the formulas are torch_backend.py's. The softmax's mean S of what arrives is
// known only after a pass over the rows, but all that comes of it is linear in S, so that one pass is enough: it sums
// what S is multiplied by, and what not.
class Backpropagation {
  public:
    Backpropagation(const Set& set, const Selected& saved, const Acc* grad, Row* dx, Acc* dq)
        : set(set),
          call(set.call),
          tau(Acc(call.tau)),
          norm(saved.norms + set.at),
          gaps(saved.gaps + set.at),
          softmax(saved.softmax + set.at),
          dx(dx + set.at * call.dim),
          dq(dq + set.at),
          width(padded(call.dim)),
          count(saved.counts[set.number]),
          earlier(std::max<int64_t>(count - 1, 0)),
          indices(saved.indices + set.number * call.k),
          arriving(count * width),
          picked(count * width),
          origin(call.euclidean ? width : 0),
          along(set.n),
          weights(call),
          unit_weight(call.min_distances ? set.n : 0),
          weight(set.n),
          chain(set.n),
          slope(set.n),
          weight_term(set.n),
          picked_here(set.n),
          nearest(earlier * set.n),
          mix(earlier * set.n) {
        if (call.euclidean && count) copy_row(set.row(indices[0]), origin.data(), call.dim, 0);
        for (int64_t step = 0; step < count; ++step) {
            std::copy_n(grad + (set.number * call.k + step) * call.dim, call.dim, &arriving[step * width]);
            make_unit(indices[step], &picked[step * width]);
            picked_here[indices[step]] = true;
        }
    }

    // Writes dx and dq of the set; returns its part of dgamma.
    double run() {
        prepare();
        for (int64_t step = count - 1; step > 0; --step) step_back(step);
        return finish();
    }

  private:
    const Set& set;
    const Call& call;
    const Acc tau;
    const Acc *norm, *gaps, *softmax;
    Row* const dx;
    Acc* const dq;
    const int64_t width, count, earlier;  // earlier: picks that have one after them
    const int64_t* const indices;
    // Gradients at the picks, and the picks made unit, or seen from the origin; (count, width).
    std::vector<Acc> arriving, picked;
    std::vector<Acc> origin;  // of the Euclidean metric: a pick, from which differences are small numbers; else none
    std::vector<Acc> along;   // x_n . gradient at the step's pick, less what the pick itself has
    Weights weights;
    std::vector<Acc> unit_weight;  // as the forward pass compared them, where there are distances to compare them with
    std::vector<Acc> weight;       // what a gap is multiplied by to give a distance
    std::vector<Acc> chain;        // gradient that the running minimum carries down from the later steps
    std::vector<Acc> slope;        // sum_j dd_j(n)
    std::vector<Acc> weight_term;  // sum_j dd_j(n) gap_j(n); at last, times the weight
    std::vector<uint8_t> picked_here;
    std::vector<Acc> nearest;  // running minimum of the gaps, (earlier, n)
    std::vector<Acc> mix;      // dcos_j(n) / |x_n|, (n, earlier)

    bool usable(int64_t i) const { return norm[i] > 0; }
    Acc gap(int64_t pick, int64_t i) const { return gaps[pick * call.all_rows + i]; }
    Acc y(int64_t step, int64_t i) const { return softmax[step * call.all_rows + i]; }
    Acc quality(int64_t i) const { return call.quality ? call.quality[set.at + i] : norm[i]; }

    Acc length(int64_t i) const { return call.normalized ? 1 : norm[i]; }
    // What a distance's gradient moves a row by, for each unit of the way from it to the pick.
    Acc pull(int64_t i) const { return call.euclidean ? 2 * weight[i] : weight[i] / length(i); }
    // A pick is 0 away from itself wherever it moves; not where nothing is projected.
    bool is_itself(int64_t i, int64_t pick) const { return !call.normalized && indices[pick] == i; }

    void make_unit(int64_t i, Acc* to) const {
        int exponent = 0;
        if (call.euclidean) {
            copy_row(set.row(i), to, call.dim, 0);
            for (int64_t c = 0; c < call.dim; ++c) to[c] -= origin[c];
            return;
        }
        const Acc size = call.normalized ? 1 : std::frexp(norm[i], &exponent);
        copy_row(set.row(i), to, call.dim, exponent);
        for (int64_t c = 0; c < call.dim; ++c) to[c] /= size;
    }

    void prepare() {
        Range range;
        for (int64_t i = 0; i < set.n; ++i)
            if (usable(i)) range.add(quality(i));
        weights.fit(range.least, range.greatest);
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                if (usable(i)) weight[i] = weights.whole(quality(i));
            for (int64_t i = begin; call.min_distances && i < end; ++i)
                if (usable(i)) unit_weight[i] = weights.at(quality(i));
            for (int64_t pick = 0; pick < earlier; ++pick)
                for (int64_t i = begin; i < end; ++i) {
                    const Acc before = pick ? nearest[(pick - 1) * set.n + i] : INFINITE;
                    nearest[pick * set.n + i] = std::min(before, gap(pick, i));
                }
        });
    }

    // A row's part of the mean S of `along`. The mean is the same from any origin; from the pick, whose softmax is
    // nearly 1 where tau is small, little is lost in the differences.
    Acc part_of_mean(int64_t step, int64_t i, Acc from) {
        if (y(step, i) == 0) return along[i] = 0;  // whatever the product, which may be infinite
        along[i] = along_row(step, i) - from;
        return y(step, i) * along[i];
    }
    Acc along_row(int64_t step, int64_t i) const {
        const Acc* const gradient = &arriving[step * width];
        return call.euclidean ? product_from(origin.data(), set.row(i), gradient, call.dim)
                              : product(set.row(i), gradient, call.dim);
    }
    Acc along_pick(int64_t step) const { return along_row(step, indices[step]); }
    Acc through_softmax(int64_t step, int64_t i, Acc mean) const { return y(step, i) * (along[i] - mean) / tau; }

    // From the gradient at a step's pick to the distances to the pick before, and so to that pick's gradient.
    void step_back(int64_t step) {
        const int64_t pick = step - 1, blocks = set.blocks();
        const Acc pick_norm = length(indices[pick]), from = along_pick(step);
        struct Part {
            Acc mean, onto_pick, onto_pick_by_mean;
        };
        std::vector<Part> parts(blocks);
        std::vector<Acc> sums(2 * blocks * width);
        set.for_blocks([&](int64_t b, int64_t begin, int64_t end) {
            WeightedSums sum(&sums[2 * b * width], &sums[(2 * b + 1) * width], call.dim,
                             call.euclidean ? origin.data() : nullptr);
            Part part = {};
            for (int64_t i = begin; i < end; ++i) {
                if (!usable(i)) continue;
                part.mean += part_of_mean(step, i, from);
                if (is_itself(i, pick)) continue;
                const Acc to_row = -share_of(pick, i) * pull(i);
                const Acc by_mean = to_row * y(step, i) / tau;
                const Acc alone = to_row * chain[i] + by_mean * along[i];
                sum.add(set.row(i), alone, by_mean);
                if (call.normalized) continue;
                // x_n is so many times u_j, and a rest
                const Acc projection = call.euclidean ? 1 : norm[i] * (1 - gap(pick, i));
                part.onto_pick += alone * projection;
                part.onto_pick_by_mean += by_mean * projection;
            }
            sum.flush();
            parts[b] = part;
        });
        double mean = 0, onto_pick = 0;
        for (const Part& part : parts) mean += part.mean;
        for (const Part& part : parts) onto_pick += part.onto_pick - mean * part.onto_pick_by_mean;
        std::vector<double> total(width);
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t c = 0; c < call.dim; ++c)
                total[c] += sums[2 * b * width + c] - mean * sums[(2 * b + 1) * width + c];
        for (int64_t c = 0; c < call.dim; ++c)
            arriving[pick * width + c] += Acc((total[c] - onto_pick * picked[pick * width + c]) / pick_norm);
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                if (!usable(i)) continue;
                const Acc all = chain[i] + through_softmax(step, i, Acc(mean)), ddistance = all * share_of(pick, i);
                chain[i] = all - ddistance;
                if (is_itself(i, pick)) continue;
                slope[i] += ddistance;
                weight_term[i] += ddistance * gap(pick, i);
                mix[i * earlier + pick] = -ddistance * pull(i);
            }
        });
    }

    // The part of d(running minimum) that goes to this distance: 1, 0, or 1/2 at an exact tie, as torch.minimum has it.
    Acc share_of(int64_t pick, int64_t i) const {
        const Acc before = pick ? nearest[(pick - 1) * set.n + i] : INFINITE, fresh = gap(pick, i);
        const Acc share = before > fresh ? 1 : before == fresh ? Acc(0.5) : 0;
        if (!call.min_distances) return share;
        const Acc known = weights.in_units(call.min_distances[set.at + i]), distance = fresh * unit_weight[i];
        return distance < known ? share : distance == known ? std::min(share, Acc(0.5)) : 0;
    }

    double finish() {
        // a first pick that was given, or is far from others, was not chosen by its quality
        const bool by_softmax = !call.start && !call.min_distances && count > 0;
        const bool by_norm = !call.quality;  // then dx waits for dq, which waits for the mean
        const Acc from = by_softmax ? along_pick(0) : 0;
        Acc mean = 0;
        if (by_softmax && by_norm)
            mean = Acc(set.sum([&](int64_t i) { return usable(i) ? part_of_mean(0, i, from) : 0; }));
        const double late_mean = set.sum([&](int64_t i) -> Acc {
            if (!usable(i)) {
                std::fill_n(dx + i * call.dim, call.dim, Row{});
                return 0;
            }
            const Acc term = weight_term[i] *= weight[i];
            dq[i] = weights.gamma_or_zero() * term / quality(i);
            Acc radial = 0;  // dx_n has so many u_n
            if (call.euclidean)
                radial = slope[i] * pull(i);
            else if (!call.normalized)
                radial = (slope[i] * weight[i] - term) / norm[i];
            if (by_norm) radial += dq[i] + (by_softmax ? through_softmax(0, i, mean) : 0);
            const Acc part = by_softmax && !by_norm ? part_of_mean(0, i, from) : 0;
            write_row(i, radial);
            return part;
        });
        if (!by_norm) mean = Acc(late_mean);
        const double dgamma = set.sum([&](int64_t i) -> Acc {
            if (!usable(i)) return dq[i] = 0;
            if (by_softmax) dq[i] += through_softmax(0, i, mean);
            return weight_term[i] * std::log(quality(i));
        });
        std::fill_n(dq + set.n, set.padding(), Acc(0));
        std::fill_n(dx + set.n * call.dim, set.padding() * call.dim, Row{});
        return dgamma;
    }

    // dx_n = radial u_n + sum_j mix_j(n) u_j, and the gradient at the pick where this row is one.
    void write_row(int64_t i, Acc radial) {
        // Copies, which the compiler knows that the stores do not change.
        const Acc *const weights = mix.data() + i * earlier, *const picks = picked.data();
        const int64_t mixed = earlier, stride = width, dim = call.dim;
        const bool is_pick = picked_here[i];
        // radial / |x_n| may be infinite for a short row where dx is not
        const bool is_short = norm[i] < Acc(1e-15);
        const Acc first = is_short ? 1 / norm[i] : 1, second = is_short ? radial : radial / norm[i];
        Row* const to = dx + i * dim;
        const Acc* const from = call.euclidean ? origin.data() : nullptr;
        for_columns(set.row(i), dim, [&](Vec x, int64_t c, int) {
            Vec sum = second * (first * (from ? x - load_work(from + c) : x));
            for (int64_t pick = 0; pick < mixed; ++pick) sum += weights[pick] * load_work(picks + pick * stride + c);
            if (is_pick)
                for (int64_t pick = 0; pick < count; ++pick)
                    if (indices[pick] == i) sum += load_work(&arriving[pick * width + c]);
            if (c + LANES <= dim)
                store(to + c, sum);
            else
                store_part(to + c, sum, dim - c);
        });
    }
};

}  // namespace fcn_kernels
