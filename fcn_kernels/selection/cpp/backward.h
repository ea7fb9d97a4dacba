// The gradient of a selection from one set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "pages.h"
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
          tau(*call.tau),
          norm(saved.norms + set.at),
          gaps(saved.gaps + set.at),
          softmax(saved.softmax + set.at),
          dx(dx + set.at * call.dim),
          dq(dq + set.at),
          past_caches(is_past_caches(dx)),
          width(padded(call.dim)),
          count(saved.counts[set.number]),
          earlier(std::max<int64_t>(count - 1, 0)),
          indices(saved.indices + set.number * call.k),
          arriving(count * width, set.memory),
          picked(count * width, set.memory),
          origin(call.euclidean ? width : 0, set.memory),
          along(set.n, set.memory),
          weights(call),
          unit_weight(call.min_distances ? set.n : 0, set.memory),
          weight(set.n, set.memory),
          chain(set.n, set.memory),
          slope(set.n, set.memory),
          weight_term(set.n, set.memory),
          picked_here(set.n, set.memory),
          nearest(earlier * set.n, set.memory),
          mix(earlier * set.n, set.memory) {
        if (call.euclidean && count) copy_row(set.row(indices[0]), origin.data(), call.dim, 0);
        for (int64_t step = 0; step < count; ++step) {
            std::copy_n(grad + (set.number * call.k + step) * call.dim, call.dim, &arriving[step * width]);
            if (step < earlier) make_unit(indices[step], &picked[step * width]);
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
    const bool past_caches;               // how dx is written
    const int64_t width, count, earlier;  // earlier: picks that have one after them
    const int64_t* const indices;
    // Gradients at the picks, and the picks made unit, or seen from the origin; (count, width).
    std::pmr::vector<Acc> arriving, picked;
    std::pmr::vector<Acc>
        origin;  // of the Euclidean metric: a pick, from which differences are small numbers; else none
    std::pmr::vector<Acc> along;  // x_n . gradient at the step's pick, less what the pick itself has
    Weights weights;
    std::pmr::vector<Acc>
        unit_weight;               // as the forward pass compared them, where there are distances to compare them with
    std::pmr::vector<Acc> weight;  // what a gap is multiplied by to give a distance
    std::pmr::vector<Acc> chain;   // gradient that the running minimum carries down from the later steps
    std::pmr::vector<Acc> slope;   // sum_j dd_j(n)
    std::pmr::vector<Acc> weight_term;  // sum_j dd_j(n) gap_j(n); at last, times the weight
    std::pmr::vector<uint8_t> picked_here;
    std::pmr::vector<Acc> nearest;  // running minimum of the gaps, (earlier, n)
    std::pmr::vector<Acc> mix;      // dcos_j(n) / |x_n|, (n, earlier)

    static constexpr int64_t LEAST_STREAMED = 1 << 20;  // bytes: about what a core's own cache holds

    // Of (64, 20, 512) float32 on two threads it took a fifth less time, and with a reader after it a tenth. Into new
    // pages, which are in cache, it took a tenth more.
    bool is_past_caches(const Row* dx) const {
        const int64_t row_bytes = call.dim * sizeof(Row), bytes = call.all_rows * row_bytes;
        return bytes >= LEAST_STREAMED && bytes < LEAST_NEW && row_bytes % sizeof(RowVec) == 0 &&
               reinterpret_cast<uintptr_t>(dx) % sizeof(RowVec) == 0;
    }
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
        const double scale = 1 / double(length(indices[pick]));
        const Acc from = along_pick(step);
        struct Part {
            Acc mean, onto_pick, onto_pick_by_mean;
        };
        std::pmr::vector<Part> parts(blocks, set.memory);
        std::pmr::vector<Acc> sums(2 * blocks * width, set.memory);
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
        std::pmr::vector<double> total(width, set.memory);
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t c = 0; c < call.dim; ++c)
                total[c] += sums[2 * b * width + c] - mean * sums[(2 * b + 1) * width + c];
        for (int64_t c = 0; c < call.dim; ++c)
            arriving[pick * width + c] += Acc((total[c] - onto_pick * picked[pick * width + c]) * scale);
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
        // without branches, which no processor foretells
        const Acc share = Acc(0.5) * ((before >= fresh) + (before > fresh));
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
        const bool is_pick = picked_here[i];
        const Acc* const from = call.euclidean ? origin.data() : nullptr;
        const int64_t mixed = earlier, stride = width, dim = call.dim;
        // radial / |x_n| may be infinite for a short row where dx is not
        const bool is_short = norm[i] < Acc(1e-15);
        const Acc first = is_short ? 1 / norm[i] : 1, second = is_short ? radial : radial / norm[i];
        const Row* const row = set.row(i);
        Row* const to = dx + i * dim;
        // so many vectors at once, as they share the weights; the last has `rest` elements
        const auto write = [&]<int VECTORS>(std::integral_constant<int, VECTORS>, int64_t c, int64_t rest) {
            Vec sums[VECTORS];
            for (int u = 0; u < VECTORS; ++u) {
                const int64_t at = c + u * LANES;
                const Vec x = rest < LANES ? load_part(row + at, rest) : load(row + at);
                sums[u] = second * (first * (from ? x - load_work(from + at) : x));
            }
            const auto add = [&](Acc weight, const Acc* vector) {
                for (int u = 0; u < VECTORS; ++u) sums[u] += weight * load_work(vector + c + u * LANES);
            };
            for (int64_t pick = 0; pick < mixed; ++pick) add(weights[pick], picks + pick * stride);
            for (int64_t pick = 0; is_pick && pick < count; ++pick)
                if (indices[pick] == i) add(1, &arriving[pick * width]);
            for (int u = 0; u < VECTORS; ++u) {
                if (rest < LANES)
                    store_part(to + c, sums[u], rest);
                else
                    past_caches ? stream(to + c + u * LANES, sums[u]) : store(to + c + u * LANES, sums[u]);
            }
        };
        int64_t c = 0;
        for (; c + UNROLLED * LANES <= dim; c += UNROLLED * LANES)
            write(std::integral_constant<int, UNROLLED>(), c, LANES);
        for (; c < dim; c += LANES) write(std::integral_constant<int, 1>(), c, std::min<int64_t>(LANES, dim - c));
    }
};

}  // namespace fcn_kernels
