// Coreset selection and its gradient on a CPU, for rows of one type: cpp_backend.py compiles this with ROW naming it.
//
// The algorithm is torch_backend.py's, row by row instead of operation by operation, so that a row is read once a step
// while it is in cache, and many rows not at all: the running minimum only falls, so in inference a row is compared
// with a pick only when its distance to the picks before could still make it the farthest.
//
// Sets go to threads whole, or, where a set is a large part of all the work, in blocks of rows. Blocks depend on the
// set's size alone, and so does every sum: the same input gives the same bits on any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};
using Row = ROW;
using Acc = std::conditional_t<std::is_same_v<Row, double>, double, float>;  // in which rows are summed

constexpr Acc INFINITE = std::numeric_limits<Acc>::infinity();

// What a thread takes of a large set: enough rows to be worth it, few enough blocks that a sum of C columns for each
// costs little beside the rows.
constexpr int64_t BLOCK_ROWS = 64, MOST_BLOCKS = 256;
// Elements of a set below which waking the other threads for each of its passes, some 5 us, costs more than it gives.
constexpr int64_t LEAST_SHARED = 64 << 10;
// A set is shared where it is more than this part of what a thread gets of all the rows.
constexpr int64_t PARTS_A_THREAD = 4;

// Memory from which large pages can be asked for: with less, there may be no whole one in it.
constexpr uintptr_t LARGE_BYTES = 4 << 20;

// --- columns, a vector register at a time ---------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / sizeof(Acc);
constexpr int UNROLLED = 4;  // sums at once: a multiply-add takes four cycles, and one starts in each

typedef Acc Vec __attribute__((vector_size(BYTES)));
typedef Acc LooseVec __attribute__((vector_size(BYTES), aligned(sizeof(Acc)), may_alias));

#ifdef BFLOAT16
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(BYTES / 2)));
typedef uint16_t RowVec __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

inline Vec load(const Row* from) {
    const HalfWords high = *reinterpret_cast<const RowVec*>(from);
    return reinterpret_cast<Vec>(__builtin_convertvector(high, Words) << 16);
}

inline void store(Row* to, Vec values) {  // to the nearest, ties to even
    const Words bits = reinterpret_cast<Words>(values);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, not_a_number = (bits >> 16) | 0x40;
    *reinterpret_cast<RowVec*>(to) = __builtin_convertvector(values == values ? rounded : not_a_number, HalfWords);
}
#else
typedef Row RowVec __attribute__((vector_size(LANES * sizeof(Row)), aligned(sizeof(Row)), may_alias));

inline Vec load(const Row* from) { return __builtin_convertvector(*reinterpret_cast<const RowVec*>(from), Vec); }
inline void store(Row* to, Vec values) { *reinterpret_cast<RowVec*>(to) = __builtin_convertvector(values, RowVec); }
#endif

inline Vec load_part(const Row* from, int64_t count) {
    Row whole[LANES] = {};
    std::memcpy(whole, from, count * sizeof(Row));
    return load(whole);
}

inline void store_part(Row* to, Vec values, int64_t count) {
    Row whole[LANES];
    store(whole, values);
    std::memcpy(to, whole, count * sizeof(Row));
}

// Working vectors are zero from C to the next multiple of LANES.
inline Vec load_work(const Acc* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store_work(Acc* to, Vec values) { *reinterpret_cast<LooseVec*>(to) = values; }
inline int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

// Asks for a row soon to be read. Left alone, a CPU reads ahead to the end of a page, which is two rows of 512 float32;
// asked two rows ahead, passes over rows that are not in cache took a sixth less time.
inline void ask_for(const Row* row, int64_t column, int64_t dim) { __builtin_prefetch(row + 2 * dim + column); }

inline Acc sum_of(const Vec (&sums)[UNROLLED]) {
    const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    Acc total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
    return total;
}

// use(vector of the row, column, which of the UNROLLED sums) for all columns.
template <class Use>
inline void for_columns(const Row* row, int64_t dim, Use use) {
    int64_t c = 0;
    for (; c + UNROLLED * LANES <= dim; c += UNROLLED * LANES)
        for (int u = 0; u < UNROLLED; ++u) use(load(row + c + u * LANES), c + u * LANES, u);
    for (; c + LANES <= dim; c += LANES) use(load(row + c), c, 0);
    if (c < dim) use(load_part(row + c, dim - c), c, 1);
}

// Not inlined, so that it rounds alike wherever it is called: equal rows have to be equally far, as ties are halved.
[[gnu::noinline]] Acc product(const Row* row, const Acc* vector, int64_t dim) {
    Vec sums[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        sums[u] += x * load_work(vector + c);
    });
    return sum_of(sums);
}

inline Acc norm_of(const Row* row, int64_t dim) {
    Vec sums[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        sums[u] += x * x;
    });
    return std::sqrt(sum_of(sums));
}

inline void copy_row(const Row* row, Acc* to, int64_t dim) {
    for_columns(row, dim, [&](Vec x, int64_t c, int) { store_work(to + c, x); });
}

// Two weighted sums of the same rows, four rows at a time, as each then reads and writes a quarter of the sums.
struct WeightedSums {
    Acc *first, *second;  // which the sums are added to
    int64_t dim;
    const Row* rows[4];
    Acc weights[2][4];
    int pending = 0;

    WeightedSums(Acc* first, Acc* second, int64_t dim) : first(first), second(second), dim(dim) {}

    void add(const Row* row, Acc weight, Acc second_weight) {
        rows[pending] = row;
        weights[0][pending] = weight;
        weights[1][pending] = second_weight;
        if (++pending == 4) flush();
    }

    void flush() {
        if (pending == 0) return;
        for (int r = pending; r < 4; ++r) rows[r] = rows[0], weights[0][r] = weights[1][r] = 0;
        pending = 0;
        int64_t c = 0;
        const auto add_columns = [&](auto load_row) {
            Vec one = load_work(first + c), two = load_work(second + c);
            for (int r = 0; r < 4; ++r) {
                const Vec x = load_row(rows[r] + c);
                one += weights[0][r] * x;
                two += weights[1][r] * x;
            }
            store_work(first + c, one);
            store_work(second + c, two);
        };
        for (; c + LANES <= dim; c += LANES) add_columns([](const Row* from) { return load(from); });
        if (c < dim) add_columns([&](const Row* from) { return load_part(from, dim - c); });
    }
};

// --- a call, its sets and their blocks ------------------------------------------------------------------------------

}  // namespace

extern "C" {

// Pointers are null for what is not given. R counts the rows of all sets, padding too; see problem.py.
struct Call {
    const Row* features;        // rows of C adjacent elements
    const Acc* quality;         // (R,)
    const Acc* noise;           // (K, R)
    const int64_t* seed;        // 0-d
    const int64_t* start;       // (B,)
    const uint8_t* mask;        // (R,)
    const int64_t* lengths;     // (B,)
    const int64_t* cu_seqlens;  // (B + 1,)
    int64_t sets, rows, all_rows, dim, k;  // B, N (of padded sets), R, C, K
    int64_t set_stride, row_stride;        // elements
    int64_t normalized, distinct, threads;
    double gamma, tau, distance_scale;
};

struct Selected {  // of problem.py; the last three are null where they are not kept
    Row* features;
    Acc* distances;
    int64_t *indices, *counts;
    Acc *softmax, *gaps, *norms;
};
}

namespace {

struct Set {
    const Call& call;
    int64_t number, at, n, threads;  // at: its first row among all R; threads: how many share it
    const Row* first;

    Set(const Call& call, int64_t number, int64_t threads) : call(call), number(number), threads(threads) {
        // Compiled calls do not look at these values; whatever they say, it stays inside the tensors.
        const auto within = [](int64_t value, int64_t most) { return std::clamp<int64_t>(value, 0, most); };
        if (call.cu_seqlens) {
            at = within(call.cu_seqlens[number], call.all_rows);
            n = within(call.cu_seqlens[number + 1] - at, call.all_rows - at);
            first = call.features + at * call.row_stride;
        } else {
            at = number * call.rows;
            n = call.lengths ? within(call.lengths[number], call.rows) : call.rows;
            first = call.features + number * call.set_stride;
        }
    }

    const Row* row(int64_t i) const { return first + i * call.row_stride; }
    // Rows of its share of the R, beyond those that take part.
    int64_t padding() const { return call.cu_seqlens ? 0 : call.rows - n; }
    int64_t block_rows() const { return std::max(BLOCK_ROWS, (n + MOST_BLOCKS - 1) / MOST_BLOCKS); }
    int64_t blocks() const { return (n + block_rows() - 1) / block_rows(); }

    // work(block, its first row, its end) for all blocks.
    template <class Work>
    void for_blocks(Work work) const {
        const int64_t size = block_rows(), count = blocks();
        const auto one = [&](int64_t b) { work(b, b * size, std::min(n, (b + 1) * size)); };
        if (threads == 1) {
            for (int64_t b = 0; b < count; ++b) one(b);
        } else {
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int64_t b = 0; b < count; ++b) one(b);
        }
    }

    // The sum of what part(row) is over the rows, by blocks.
    template <class Part>
    double sum(Part part) const {
        std::vector<Acc> parts(blocks());
        for_blocks([&](int64_t b, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) parts[b] += part(i);
        });
        double total = 0;
        for (const Acc p : parts) total += p;
        return total;
    }
};

template <class Work>
void for_sets(const Call& call, Work work) {
    const auto is_shared = [&](int64_t b) {
        const int64_t n = Set(call, b, 1).n;
        return call.threads > 1 && n * call.dim >= LEAST_SHARED && n * PARTS_A_THREAD * call.threads > call.all_rows;
    };
    int64_t shared = 0;
    for (int64_t b = 0; b < call.sets; ++b)
        if (is_shared(b)) work(Set(call, b, call.threads)), ++shared;
    if (shared == call.sets) return;
    const bool few = call.all_rows * call.dim < LEAST_SHARED || call.sets - shared == 1;
#pragma omp parallel for schedule(dynamic) num_threads(few ? 1 : call.threads)
    for (int64_t b = 0; b < call.sets; ++b)
        if (!is_shared(b)) work(Set(call, b, 1));
}

// A gradient as large as its set is new memory, which the system hands out page by page as it is written: half of the
// time of a backward pass over 100,000 rows, were the pages not asked for by the 2 MiB.
void ask_for_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
    const uintptr_t page = sysconf(_SC_PAGESIZE), from = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (from + page - 1) / page * page, end = (from + bytes) / page * page;
    if (end > begin + LARGE_BYTES) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline bool is_sound(Acc value) { return value > 0 && value < INFINITE; }  // NaN is neither

// --- noise: noise.py's, value by value ------------------------------------------------------------------------------

constexpr int STEPS_PER_DRAW = 4;

struct Words4 {
    uint32_t word[4];
};

inline Words4 philox(uint64_t seed, uint32_t row, uint32_t block, uint32_t set) {
    uint32_t c0 = row, c1 = block, c2 = set, c3 = 0, key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p2 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p2 >> 32) ^ c1 ^ key0;
        c1 = uint32_t(p2);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
        c3 = uint32_t(p0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

inline Acc gumbel(uint32_t word) {
    const float minus_v = std::max((float(word) + 0.5f) * -0x1p-32f, 0x1p-24f - 1);
    return -std::log(-std::log1p(minus_v));
}

class Noise {
  public:
    explicit Noise(const Set& set) : set(set), drawn(set.call.seed ? STEPS_PER_DRAW * set.n : 0) {}

    explicit operator bool() const { return set.call.seed || set.call.noise; }

    // To be called for each step in turn.
    void advance(int64_t step) {
        const Call& call = set.call;
        if (call.noise) values = call.noise + step * call.all_rows + set.at;
        if (!call.seed) return;
        if (step % STEPS_PER_DRAW == 0) {
            const int64_t used = std::min<int64_t>(STEPS_PER_DRAW, call.k - step);
            set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    const Words4 words = philox(uint64_t(*call.seed), i, step / STEPS_PER_DRAW, set.number);
                    for (int64_t w = 0; w < used; ++w) drawn[w * set.n + i] = gumbel(words.word[w]);
                }
            });
        }
        values = drawn.data() + step % STEPS_PER_DRAW * set.n;
    }

    Acc at(int64_t i) const { return values ? values[i] : 0; }

  private:
    const Set& set;
    std::vector<Acc> drawn;
    const Acc* values = nullptr;
};

// --- selection ------------------------------------------------------------------------------------------------------

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
        : set(set), call(set.call), out(out), keep(out.norms), noise(set), barred(set.n), quality(set.n),
          gap(set.n, INFINITE), coefficient(set.n), met(set.n), directions(call.k * padded(call.dim)), picks(call.k) {
        norm.resize(set.n);
    }

    void run() {
        const Best first = first_pick();
        int64_t count = 0, usable = 0;
        if (first.row >= 0) {
            record(0, first.row, INFINITE);
            count = 1;
            if (keep || call.k > 1) usable = meet_first();
        }
        if (keep) {
            write_norms(first.row >= 0);
            if (count && !call.start)
                keep_softmax(0, first.row);
            else
                forget(out.softmax);
        }
        for (; count < std::min(call.k, usable); ++count) {
            if (call.distinct) barred[picks[count - 1]] = true;
            noise.advance(count);
            const int64_t pick = farthest(count);
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
    std::vector<uint8_t> barred;  // rows that cannot be picked
    std::vector<Acc> quality, norm, gap, coefficient;
    std::vector<int32_t> met;  // picks that the gap knows of
    std::vector<Acc> directions;
    std::vector<int64_t> picks;

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
        for (int64_t i = 0; i < set.n; ++i) barred[i] = call.mask && !call.mask[set.at + i];
        bool have_norms = !call.quality;
        if (have_norms) measure_norms();
        for (int64_t i = 0; i < set.n; ++i) {
            quality[i] = call.quality ? call.quality[set.at + i] : norm[i];
            barred[i] |= !is_sound(quality[i]);
        }
        if (call.start) {
            Best given;
            const int64_t i = call.start[set.number];
            if (i >= 0 && i < set.n && !barred[i] && is_sound(norm[i] = norm_of(set.row(i), call.dim)))
                given.meet(0, i);
            return given;
        }
        noise.advance(0);
        for (;;) {
            const Best best = best_of_blocks([&](int64_t begin, int64_t end) {
                Best best;
                for (int64_t i = begin; i < end; ++i)
                    if (!barred[i]) best.meet(quality[i] + noise.at(i), i);
                return best;
            });
            if (best.row < 0 || have_norms) return best;
            if (is_sound(norm[best.row] = norm_of(set.row(best.row), call.dim))) return best;
            measure_norms();  // one row that cannot be used may be one of many
            have_norms = true;
        }
    }

    void measure_norms() {
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                if (!barred[i]) barred[i] = !is_sound(norm[i] = norm_of(set.row(i), call.dim));
        });
    }

    // All rows' norms, coefficients and gaps to the first pick; the number of rows that can be picked. A row that has
    // come from memory for its norm is in cache for the rest.
    int64_t meet_first() {
        const Acc gamma = Acc(call.gamma), scale = Acc(call.distance_scale);
        return int64_t(set.sum([&](int64_t i) -> Acc {
            if (barred[i]) return 0;
            norm[i] = norm_of(set.row(i), call.dim);
            if (!is_sound(norm[i])) return barred[i] = true, 0;
            coefficient[i] = std::pow(quality[i], gamma) * scale / (call.normalized ? 1 : norm[i]);
            meet(i, 0);
            return 1;
        }));
    }

    void meet(int64_t i, int64_t pick) {
        const Acc along = product(set.row(i), &directions[pick * padded(call.dim)], call.dim);
        const Acc fresh = call.normalized ? 1 - along : norm[i] - along / norm[picks[pick]];
        const Acc positive = std::max<Acc>(fresh, 0);  // rounding can take it below a picked row's 0 to itself
        if (keep && pick < call.k - 1) out.gaps[pick * call.all_rows + set.at + i] = positive;
        gap[i] = std::min(gap[i], positive);
        met[i] = pick + 1;
    }

    // The pick of a later step. In inference, each block's row of the highest bound meets the picks that it has not met
    // yet, and then the rows whose bounds are above the best of those.
    int64_t farthest(int64_t step) {
        // fma, lest the compiler round differently here and there, and equal rows not be equal
        const auto noisy = [&](int64_t i) { return std::fma(gap[i], coefficient[i], noise.at(i)); };
        const auto meet_all = [&](int64_t i) {
            for (int64_t pick = met[i]; pick < step; ++pick) meet(i, pick);
        };
        Best so_far;
        if (!keep && step > 1) {
            so_far = best_of_blocks([&](int64_t begin, int64_t end) {
                Best highest, best;
                for (int64_t i = begin; i < end; ++i)
                    if (!barred[i]) highest.meet(noisy(i), i);
                if (highest.row < 0) return best;
                meet_all(highest.row);
                best.meet(noisy(highest.row), highest.row);
                return best;
            });
        }
        return best_of_blocks([&](int64_t begin, int64_t end) {
                   Best best = so_far;
                   for (int64_t i = begin; i < end; ++i) {
                       if (barred[i] || (!keep && best.is_above(noisy(i), i))) continue;
                       meet_all(i);
                       best.meet(noisy(i), i);
                   }
                   return best;
               }).row;
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
        std::memcpy(copy, set.row(pick), call.dim * sizeof(Row));
        copy_row(set.row(pick), &directions[step * padded(call.dim)], call.dim);
    }

    // softmax(noisy logits / tau) of a step; its pick has the greatest.
    void keep_softmax(int64_t step, int64_t pick) {
        Acc* const y = out.softmax + step * call.all_rows + set.at;
        const auto noisy = [&](int64_t i) {
            return (step ? gap[i] * coefficient[i] : quality[i]) + noise.at(i);
        };
        const Acc greatest = noisy(pick), tau = Acc(call.tau);
        const Acc total = Acc(set.sum([&](int64_t i) {
            return y[i] = barred[i] ? 0 : std::exp((noisy(i) - greatest) / tau);
        }));
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

// --- gradient -------------------------------------------------------------------------------------------------------

// One set's way back through the steps; the formulas are torch_backend.py's. The softmax's mean S of what arrives is
// known only after a pass over the rows, but all that comes of it is linear in S, so that one pass is enough: it sums
// what S is multiplied by, and what not.
class Backpropagation {
  public:
    Backpropagation(const Set& set, const Selected& saved, const Acc* grad, Row* dx, Acc* dq)
        : set(set), call(set.call), tau(Acc(call.tau)), norm(saved.norms + set.at), gaps(saved.gaps + set.at),
          softmax(saved.softmax + set.at), dx(dx + set.at * call.dim), dq(dq + set.at), width(padded(call.dim)),
          count(saved.counts[set.number]), earlier(std::max<int64_t>(count - 1, 0)),
          indices(saved.indices + set.number * call.k), arriving(count * width), picked(count * width), along(set.n),
          coefficient(set.n), chain(set.n), slope(set.n), weight_term(set.n), picked_here(set.n),
          nearest(earlier * set.n), mix(earlier * set.n) {
        for (int64_t step = 0; step < count; ++step) {
            std::copy_n(grad + (set.number * call.k + step) * call.dim, call.dim, &arriving[step * width]);
            copy_row(set.row(indices[step]), &picked[step * width], call.dim);
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
    std::vector<Acc> arriving, picked;  // gradients at the picks, and the picks; (count, width)
    std::vector<Acc> along;             // x_n . gradient at the step's pick, less what the pick itself has
    std::vector<Acc> coefficient;       // what a gap is multiplied by to give a distance
    std::vector<Acc> chain;             // gradient that the running minimum carries down from the later steps
    std::vector<Acc> slope;             // sum_j dd_j(n)
    std::vector<Acc> weight_term;       // sum_j dd_j(n) gap_j(n); at last, times the coefficient
    std::vector<uint8_t> picked_here;
    std::vector<Acc> nearest;  // running minimum of the gaps, (earlier, n)
    std::vector<Acc> mix;      // dcos_j(n) / (|x_n| |x_j|), (n, earlier)

    bool usable(int64_t i) const { return norm[i] > 0; }
    Acc gap(int64_t pick, int64_t i) const { return gaps[pick * call.all_rows + i]; }
    Acc y(int64_t step, int64_t i) const { return softmax[step * call.all_rows + i]; }
    Acc quality(int64_t i) const { return call.quality ? call.quality[set.at + i] : norm[i]; }

    void prepare() {
        const Acc gamma = Acc(call.gamma), scale = Acc(call.distance_scale);
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                coefficient[i] = std::pow(quality(i), gamma) * scale / (call.normalized ? 1 : norm[i]);
            for (int64_t pick = 0; pick < earlier; ++pick)
                for (int64_t i = begin; i < end; ++i) {
                    const Acc before = pick ? nearest[(pick - 1) * set.n + i] : INFINITE;
                    nearest[pick * set.n + i] = std::min(before, gap(pick, i));
                }
        });
    }

    // A row's part of the mean S of `along`. The mean is the same from any origin; from the pick, whose softmax is
    // nearly 1 where tau is small, little is lost in the differences.
    Acc part_of_mean(int64_t step, int64_t i, Acc origin) {
        along[i] = product(set.row(i), &arriving[step * width], call.dim) - origin;
        return y(step, i) * along[i];
    }
    Acc origin(int64_t step) const { return product(set.row(indices[step]), &arriving[step * width], call.dim); }
    Acc through_softmax(int64_t step, int64_t i, Acc mean) const { return y(step, i) * (along[i] - mean) / tau; }

    // From the gradient at a step's pick to the distances to the pick before, and so to that pick's gradient.
    void step_back(int64_t step) {
        const int64_t pick = step - 1, blocks = set.blocks();
        const Acc pick_norm = call.normalized ? 1 : norm[indices[pick]], from = origin(step);
        struct Part {
            Acc mean, onto_pick, onto_pick_by_mean;
        };
        std::vector<Part> parts(blocks);
        std::vector<Acc> sums(2 * blocks * width);
        const auto weight_of = [&](int64_t i) { return -share_of(pick, i) * coefficient[i] / pick_norm; };
        set.for_blocks([&](int64_t b, int64_t begin, int64_t end) {
            WeightedSums sum(&sums[2 * b * width], &sums[(2 * b + 1) * width], call.dim);
            Part part = {};
            for (int64_t i = begin; i < end; ++i) {
                if (!usable(i)) continue;
                part.mean += part_of_mean(step, i, from);
                const Acc weight = weight_of(i), by_mean = weight * y(step, i) / tau;
                const Acc alone = weight * chain[i] + by_mean * along[i];
                sum.add(set.row(i), alone, by_mean);
                if (call.normalized) continue;
                const Acc projection = (norm[i] - gap(pick, i)) / pick_norm;  // x_n is so many times x_j, and a rest
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
            arriving[pick * width + c] += Acc(total[c] - onto_pick * picked[pick * width + c]);
        set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                if (!usable(i)) continue;
                const Acc all = chain[i] + through_softmax(step, i, Acc(mean)), ddistance = all * share_of(pick, i);
                chain[i] = all - ddistance;
                slope[i] += ddistance;
                weight_term[i] += ddistance * gap(pick, i);
                mix[i * earlier + pick] = -ddistance * coefficient[i] / pick_norm;
            }
        });
    }

    // The part of d(running minimum) that goes to this distance: 1, 0, or 1/2 at an exact tie, as torch.minimum has it.
    Acc share_of(int64_t pick, int64_t i) const {
        if (pick == 0) return 1;
        const Acc before = nearest[(pick - 1) * set.n + i], fresh = gap(pick, i);
        return before > fresh ? 1 : before == fresh ? Acc(0.5) : 0;
    }

    double finish() {
        const bool by_softmax = !call.start && count > 0;  // a given first pick was not chosen
        const bool by_norm = !call.quality;                // then dx waits for dq, which waits for the mean
        const Acc from = by_softmax ? origin(0) : 0;
        Acc mean = 0;
        if (by_softmax && by_norm)
            mean = Acc(set.sum([&](int64_t i) { return usable(i) ? part_of_mean(0, i, from) : 0; }));
        const double late_mean = set.sum([&](int64_t i) -> Acc {
            if (!usable(i)) {
                std::fill_n(dx + i * call.dim, call.dim, Row{});
                return 0;
            }
            const Acc term = weight_term[i] *= coefficient[i];
            dq[i] = Acc(call.gamma) * term / quality(i);
            Acc radial = 0;  // dx_n has so many x_n
            if (!call.normalized) radial = (slope[i] * coefficient[i] * norm[i] - term) / (norm[i] * norm[i]);
            if (by_norm) radial += (dq[i] + (by_softmax ? through_softmax(0, i, mean) : 0)) / norm[i];
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

    // dx_n = radial x_n + sum_j mix_j(n) x_j, and the gradient at the pick where this row is one.
    void write_row(int64_t i, Acc radial) {
        const Acc* const weights = mix.data() + i * earlier;
        const Acc* const rows = picked.data();
        const int64_t rows_count = earlier, stride = width;  // which the stores cannot change
        const bool is_pick = picked_here[i];
        Row* const to = dx + i * call.dim;
        const int64_t dim = call.dim;
        for_columns(set.row(i), dim, [&](Vec x, int64_t c, int) {
            Vec sum = radial * x;
            for (int64_t pick = 0; pick < rows_count; ++pick) sum += weights[pick] * load_work(rows + pick * stride + c);
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

}  // namespace

extern "C" void forward(const Call* call, const Selected* out) {
    for_sets(*call, [&](const Set& set) { Selection(set, *out).run(); });
}

// grad (B, K, C) -> dx (R, C), dq (R,), dgamma.
extern "C" void backward(const Call* call, const Selected* saved, const Acc* grad, Row* dx, Acc* dq, Acc* dgamma) {
    std::vector<double> parts(call->sets);
    ask_for_large_pages(dx, call->all_rows * call->dim * sizeof(Row));
    for_sets(*call, [&](const Set& set) {
        parts[set.number] = Backpropagation(set, *saved, grad, dx, dq).run();
    });
    double total = 0;
    for (const double part : parts) total += part;
    *dgamma = Acc(total);
}
