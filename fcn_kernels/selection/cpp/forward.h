// Selection from one set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "buckets.h"
#include "exponentials.h"
#include "noise.h"
#include "weights.h"

namespace fcn_kernels {

struct Best {
    Acc value = -INFINITE;
    int64_t row = -1;

    bool is_above(Acc other, int64_t i) const { return row >= 0 && (other < value || (other == value && i > row)); }
    void meet(Acc other, int64_t i) {
        if (row < 0 || other > value || (other == value && i < row)) value = other, row = i;
    }
};

// A pick that was made; of the sets' rows in all processes.
struct Pick {
    int64_t row = -1, here = -1;  // its number in the set, and among our rows; -1: none
    Acc score = -INFINITE, distance = 0;
    const Row* features = nullptr;
};

// One set's way through the K steps. A row's logit is the least of its distances to the picks it met, each its gap (1 -
// cosine, or the squared distance) times its weight, and to what was picked before the call.
class Selection {
  public:
    Selection(const Set& set, const Selected& out)
        : set(set),
          call(set.call),
          out(out),
          keep(out.norms),
          noise(set),
          barred(set.n, set.memory),
          norm(set.n, set.memory),
          least(padded(set.n), set.memory),
          weight(padded(set.n), set.memory),
          met(set.n, set.memory),
          quality(call.quality ? call.quality + set.at : norm),
          nearest(out.nearest ? out.nearest + set.at : nullptr),
          known(call.min_distances ? call.min_distances + set.at : nullptr),
          weights(call),
          wanted(set.picks()),
          most(call.ranks ? wanted : std::min(wanted, set.n)),
          directions(std::max<int64_t>(most, 1) * padded(call.dim), set.memory),
          pick_norms(most, set.memory),
          own_cosines(most, set.memory),
          picks(most, set.memory),
          points(call.euclidean && call.dim <= Points::MOST_DIM ? set.n : 0, call.dim) {
        std::fill(least + set.n, least + padded(set.n), Acc(-1));
        std::fill(weight + set.n, weight + padded(set.n), Acc(0));
    }

    void run() {
        const Pick first = agree(0, first_pick());
        int64_t count = 0, usable = 0;
        Best second;
        if (first.row >= 0) {
            if (wanted > 0) {
                record(0, first);
                count = 1;
            }
            if (keep || nearest || wanted > 1) usable = meet_first(count, second);
        }
        if (keep) {
            write_norms(first.row >= 0);
            if (count && by_quality())
                keep_softmax(0, first.score);
            else
                forget(out.softmax);
        }
        for (; count < std::min(wanted, usable); ++count) {
            if (call.distinct) take_out(count - 1);
            Best best = second;
            if (keep || count > 1) {
                noise.advance(count);
                best = farthest(count);
            }
            const Pick pick = agree(count, best);
            record(count, pick);
            if (keep) keep_softmax(count, pick.score);
        }
        out.counts[set.number] = count;
        if (nearest) write_state(count, first.row >= 0);
        for (int64_t step = count; step < call.k; ++step) {
            record(step, Pick());
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
    Unset<uint8_t> barred;  // rows that cannot be picked, or not any more; of the former, the rest is not set
    Unset<Acc> norm, least, weight;
    Unset<int32_t> met;  // picks that the logit knows of
    const Acc* const quality;
    int64_t* const nearest;  // null where no state is asked for
    const Acc* const known;  // distances to what was picked before, or null
    Weights weights;
    Acc noise_scale = 1;
    const int64_t wanted, most;  // picks, and those there can be
    // Of each pick: its row times a power of two that keeps products with it in range, that row's norm, and the cosine
    // to itself as it rounds.
    std::pmr::vector<Acc> directions, pick_norms, own_cosines;
    std::pmr::vector<int64_t> picks;      // among our rows, or -1
    double pooled[3] = {0, INFINITE, 0};  // of all processes' rows, where there are others: see Ranks
    Points points;                        // none where rows are long, or not compared by their differences
    std::unique_ptr<Buckets> buckets;     // of many points, from the third pick on; then they have the logits

    static constexpr uint8_t TAKEN = 2;  // picked, with `distinct`

    bool by_quality() const { return !call.start && !known; }
    // A norm; of the Euclidean metric, which has no use for it, 1.
    Acc measured(int64_t i) const {
        if (!call.euclidean) return norm_of(set.row(i), call.dim);
        return is_finite(set.row(i), call.dim) ? 1 : std::numeric_limits<Acc>::quiet_NaN();
    }
    Acc before(int64_t i) const { return known ? weights.in_units(known[i]) : INFINITE; }

    // What a step compares.
    Acc noisy(int64_t step, int64_t i) const {
        const Acc logit = step ? least[i] : known ? known[i] : quality[i];
        const Acc score = logit + noise.at(i) * (step ? noise_scale : 1);
        return score >= -INFINITE ? score : -INFINITE;  // NaN is the least
    }

    template <class Scan>
    Best best_of_blocks(Scan scan) const {
        std::pmr::vector<Best> found(set.blocks(), set.memory);
        set.for_blocks([&](int64_t b, int64_t begin, int64_t end) { found[b] = scan(begin, end); });
        Best best;
        for (const Best& f : found)
            if (f.row >= 0) best.meet(f.value, f.row);
        return best;
    }

    Acc distance(int64_t step, int64_t i) const {
        return step ? weights.reported(least[i]) : known ? known[i] : INFINITE;
    }

    // The best of our rows, or of all processes'.
    Pick agree(int64_t step, const Best& best) const {
        const int64_t i = best.row, before = set.rows_before();
        Pick pick;
        if (i >= 0) pick = {before + i, i, best.value, distance(step, i), set.row(i)};
        if (!call.ranks) return pick;
        const Ranks& ranks = *call.ranks;
        Ballot ballot = {pick.score, pick.distance, pick.row};  // copied, as others' need not be aligned
        std::memcpy(ranks.ballot, &ballot, sizeof(Ballot));
        if (i >= 0) std::memcpy(ranks.ballot + sizeof(Ballot), pick.features, call.dim * sizeof(Row));
        if (ranks.agree()) throw std::runtime_error("the ranks did not agree");
        Best of_all;
        for (int64_t r = 0; r < ranks.world; ++r) {
            const uint8_t* const bytes = ranks.ballots + r * ranks.size;
            std::memcpy(&ballot, bytes, sizeof(Ballot));
            if (ballot.row < 0) continue;
            of_all.meet(ballot.score, ballot.row);
            if (of_all.row != ballot.row) continue;
            const int64_t here = i >= 0 && ballot.row == before + i ? i : -1;
            const Row* const features = reinterpret_cast<const Row*>(bytes + sizeof(Ballot));
            pick = {ballot.row, here, ballot.score, ballot.distance, features};
        }
        return pick;
    }

    // What all processes have to know of one another's rows before the first pick.
    void pool() {
        const Range range = qualities();
        pooled[0] = double(std::count(+barred, barred + set.n, 0));
        pooled[1] = range.least, pooled[2] = range.greatest;
        if (call.ranks->pool(pooled)) throw std::runtime_error("the ranks did not agree");
    }

    // Of the highest quality, the farthest from what was picked before, or the given one. Where the quality is given,
    // rows are read only once the pick is known, so that their norms and their products with it take one pass.
    Best first_pick() {
        bool measure = !call.quality || known || call.ranks;
        const auto favourite = [&] {
            set.for_blocks([&](int64_t, int64_t begin, int64_t end) { admit(begin, end, measure); });
            if (call.ranks) pool();
            return best_of_blocks([&](int64_t begin, int64_t end) {
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
            const int64_t i = call.start[set.number] - set.rows_before();
            if (i >= 0 && i < set.n && !barred[i] && std::isnormal(norm[i] = measured(i))) given.meet(0, i);
            return given;
        }
        if (best.row < 0 || measure) return best;
        if (std::isnormal(norm[best.row] = measured(best.row))) return best;
        measure = true;  // one row that cannot be used may be one of many
        return favourite();
    }

    void admit(int64_t begin, int64_t end, bool measure) {
        for (int64_t i = begin; i < end; ++i)
            barred[i] = (call.mask && !call.mask[set.at + i]) || (call.quality && !is_sound(quality[i])) ||
                        (known && !(known[i] >= 0));
        for (int64_t i = begin; measure && i < end; ++i)
            if (!barred[i]) barred[i] = !std::isnormal(norm[i] = measured(i));
    }

    Range qualities() const {
        Range range;
        for (int64_t i = 0; i < set.n; ++i)
            if (!barred[i]) range.add(quality[i]);
        return range;
    }

    // Only rows that can be picked have a say in how the weights are scaled, so that where these leave the ordinary
    // range all norms have to be known first.
    void fit_weights() {
        const Range range = call.ranks ? Range{Acc(pooled[1]), Acc(pooled[2])} : qualities();
        if (!weights.fit(range.least, range.greatest) && call.quality && !call.ranks) {
            set.for_blocks([&](int64_t, int64_t begin, int64_t end) { admit(begin, end, true); });
            const Range usable = qualities();
            weights.fit(usable.least, usable.greatest);
        }
        noise_scale = weights.noise_scale();
    }

    // All rows' norms, weights and distances to the first pick if there is one, and in inference the second pick, in
    // one pass. Returns how many rows can be picked. A row that has come from memory for its norm is in cache for the
    // rest.
    int64_t meet_first(int64_t count, Best& second) {
        fit_weights();
        const int64_t taken = call.distinct && count ? picks[0] : -1;
        std::pmr::vector<int64_t> usable(set.blocks(), set.memory);
        const bool more = !keep && wanted > 1, at_once = count && !call.euclidean;
        if (more) noise.advance(1);
        second = best_of_blocks([&](int64_t begin, int64_t end) {
            Best best;
            int64_t& found = usable[begin / set.block_rows()];
            for (int64_t i = begin; i < end; ++i) {
                Acc along = 0;
                if (!barred[i]) {
                    if (at_once)
                        std::tie(norm[i], along) = norm_and_product(set.row(i), direction(0), call.dim);
                    else
                        norm[i] = measured(i);
                    barred[i] = !std::isnormal(norm[i]);
                }
                if (points) points.set(i, barred[i] ? nullptr : set.row(i));
                least[i] = -1;
                weight[i] = 0;
                if (barred[i]) continue;
                ++found;
                weight[i] = weights.at(quality[i]);
                least[i] = before(i);
                met[i] = 0;
                if (nearest) nearest[i] = -1;
                if (at_once)
                    meet(i, 0, gap(along, i, 0));
                else if (count && !points)
                    meet(i, 0);
            }
            if (count && points) meet_points(begin, end, 0);
            for (int64_t i = begin; more && i < end; ++i)
                if (!barred[i] && i != taken) best.meet(noisy(1, i), i);
            return best;
        });
        return call.ranks ? int64_t(pooled[0]) : std::accumulate(usable.begin(), usable.end(), int64_t(0));
    }

    Acc* direction(int64_t pick) { return &directions[pick * padded(call.dim)]; }

    // Of a row that is so long and has such a product with the pick's direction.
    Acc cosine(Acc along, Acc length, int64_t pick) const {
        return call.normalized ? along : along / length / pick_norms[pick];
    }

    Acc gap(Acc along, int64_t i, int64_t pick) const {
        const Acc towards = cosine(along, norm[i], pick);
        // a pick and its duplicates are at 0, whatever their cosine rounds to
        return towards == own_cosines[pick] ? 0 : std::max<Acc>(1 - towards, 0);
    }

    void meet(int64_t i, int64_t pick) {
        const Acc* const of_pick = direction(pick);
        meet(i, pick,
             call.euclidean ? squared_distance(set.row(i), of_pick, call.dim)
                            : gap(product(set.row(i), of_pick, call.dim), i, pick));
    }

    void meet(int64_t i, int64_t pick, Acc fresh) {
        const Acc distance = fresh * weight[i];
        if (keep && pick < call.k - 1) out.gaps[pick * call.all_rows + set.at + i] = fresh;
        if (nearest && distance < least[i]) nearest[i] = pick;
        // without a branch, which no processor foretells; also if the distance is NaN
        least[i] = least[i] < distance ? least[i] : distance;
        met[i] = pick + 1;
    }

    // The same for rows [begin, end) at once; returns the farthest of them, without noise. Rows that are barred have a
    // logit below 0, which stays.
    Best meet_points(int64_t begin, int64_t end, int64_t pick) {
        Acc* const gaps = keep && pick < call.k - 1 ? out.gaps + pick * call.all_rows + set.at : nullptr;
        const Acc* const of_weight = weight;  // copies, which the compiler knows that the stores do not change
        Acc* const of_least = least;
        Vec highest = Vec{} - 1;
        Lanes rows = {};
        const auto update = [&](Vec squares, int64_t i) {
            const Vec old = load_work(of_least + i), distance = squares * load_work(of_weight + i);
            const Vec now = old <= distance ? old : distance;
            store_work(of_least + i, now);
            const Lanes higher = now > highest;
            highest = higher ? now : highest;
            rows = higher ? Lanes{} + Lane(i) : rows;
            return old;
        };
        const Acc* const point = direction(pick);
        if (!gaps && !nearest)
            points.meet(begin, end, point, update);
        else
            points.meet(begin, end, point, [&](Vec squares, int64_t i) {
                const Vec old = update(squares, i), now = load_work(of_least + i);
                for (int64_t lane = 0; lane < std::min<int64_t>(LANES, end - i); ++lane) {
                    if (gaps) gaps[i + lane] = squares[lane];
                    if (nearest && now[lane] < old[lane] && !barred[i + lane]) nearest[i + lane] = pick;
                }
            });
        Best best;
        for (int64_t lane = 0; lane < LANES; ++lane)
            if (highest[lane] >= 0) best.meet(highest[lane], rows[lane] + lane);
        return best;
    }

    // Bars a picked row. It meets no further pick, and its gaps to them, which no gradient comes through, are 0.
    void take_out(int64_t step) {
        const int64_t i = picks[step];
        if (i < 0) return;
        barred[i] = TAKEN;
        if (nearest && least[i] > 0) nearest[i] = step;
        if (points) least[i] = -1;
        if (buckets) buckets->take_out();
        for (int64_t pick = step; keep && pick < call.k - 1; ++pick) out.gaps[pick * call.all_rows + set.at + i] = 0;
    }

    // Least distances and nearest picks as the next call takes them.
    void write_state(int64_t count, bool any) {
        if (buckets) buckets->write(least);
        if (call.distinct && count) take_out(count - 1);
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            if (any && count > 1 && points) meet_points(begin, end, count - 1);
            for (int64_t i = begin; i < end; ++i) {
                if (any && barred[i] == TAKEN) {
                    out.least[set.at + i] = -INFINITE;
                    continue;
                }
                if (!any || barred[i]) {
                    out.least[set.at + i] = known && known[i] == -INFINITE ? -INFINITE : 0;
                    nearest[i] = -1;
                    continue;
                }
                for (int64_t pick = met[i]; !points && pick < count; ++pick) meet(i, pick);
                // a squared distance times its weight may have left the range: it ends at the largest number
                if (count && nearest[i] < 0 && least[i] == INFINITE) nearest[i] = 0;
                const Acc alone = known ? known[i] : INFINITE;
                out.least[set.at + i] = nearest[i] >= 0 ? weights.reported(least[i]) : alone;
            }
        });
        std::fill_n(out.least + set.at + set.n, set.padding(), Acc(0));
        std::fill_n(nearest + set.n, set.padding(), -1);
        for (int64_t i = set.n; known && i < set.n + set.padding(); ++i)
            if (known[i] == -INFINITE) out.least[set.at + i] = -INFINITE;
    }

    // The pick of a later step. In inference, each block's row of the highest bound meets the picks that it has not met
    // yet, and then the rows whose bounds are above the best of those.
    Best farthest(int64_t step) {
        const auto meet_all = [&](int64_t i) {
            for (int64_t pick = met[i]; pick < step; ++pick) meet(i, pick);
        };
        if (points) return farthest_point(step);
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
        });
    }

    Best farthest_point(int64_t step) {
        const bool plain = !call.noise && !call.seed && weights.are_numbers();
        if (plain && !keep && set.n >= Buckets::LEAST_ROWS) return farthest_of_buckets(step);
        return best_of_blocks([&](int64_t begin, int64_t end) {
            Best best;
            if (step > 1) best = meet_points(begin, end, step - 1);
            if (plain && best.row >= 0) return best;
            best = {};
            for (int64_t i = begin; i < end; ++i)
                if (!barred[i]) best.meet(noisy(step, i), i);
            return best;
        });
    }

    Best farthest_of_buckets(int64_t step) {
        if (!buckets) buckets.reset(new Buckets(points, set.n, barred, least, weight));
        const Acc* const point = direction(step - 1);
        if (nearest)
            buckets->meet(point, [&](int64_t i) { nearest[i] = step - 1; });
        else
            buckets->meet(point, [](int64_t) {});  // without a look at each row
        Acc logit = 0;
        const int64_t row = buckets->farthest(logit);
        if (row >= 0) least[row] = logit;
        return {logit, row};
    }

    void record(int64_t step, const Pick& pick) {
        const int64_t place = set.number * call.k + step;
        Row* const copy = out.features + place * call.dim;
        out.indices[place] = pick.row;
        out.distances[place] = pick.distance;
        if (pick.row < 0) {
            std::fill_n(copy, call.dim, Row{});
            return;
        }
        picks[step] = pick.here;
        std::memcpy(copy, pick.features, call.dim * sizeof(Row));
        if (call.euclidean) return copy_row(pick.features, direction(step), call.dim, 0);
        const Acc length = pick.here < 0 ? norm_of(pick.features, call.dim) : norm[pick.here];
        int exponent = 0;
        if (!call.normalized) pick_norms[step] = std::frexp(length, &exponent);
        copy_row(pick.features, direction(step), call.dim, exponent);
        own_cosines[step] = cosine(product(pick.features, direction(step), call.dim), length, step);
    }

    // softmax(noisy logits / tau) of a step, whose pick has the greatest; without its denominator where that is a sum
    // over all processes' rows.
    void keep_softmax(int64_t step, Acc greatest) {
        Acc* const y = out.softmax + step * call.all_rows + set.at;
        const Acc tau = *call.tau;
        if (!std::isfinite(greatest)) return forget(out.softmax + step * call.all_rows);
        const Acc total = Acc(set.sum_of_blocks([&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const Acc below = barred[i] ? -INFINITE : noisy(step, i) - greatest;
                y[i] = (step ? weights.shifted(below) : below) / tau;
            }
            exponentials(y + begin, end - begin);
            return std::accumulate(y + begin, y + end, 0.0);
        }));
        const Acc denominator = call.ranks ? 1 : total;
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) y[i] /= denominator;
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
