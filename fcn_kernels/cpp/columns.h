// Rows, a vector register at a time. ROW is the type of their elements, or they are of Acc, in which they are summed;
// BFLOAT16 or FLOAT16 is defined where ROW is that.

#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace fcn_kernels {

struct bfloat16 {
    uint16_t bits;
};
using Row = ROW;
using Acc = std::conditional_t<std::is_same_v<Row, double>, double, float>;  // in which rows are summed

constexpr Acc INFINITE = std::numeric_limits<Acc>::infinity();
inline bool is_sound(Acc value) { return value > 0 && value < INFINITE; }             // NaN is neither
constexpr Acc LEAST_SQUARE = std::is_same_v<Acc, double> ? Acc(1e-280) : Acc(1e-30);  // of a norm, with all its digits

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

inline RowVec rounded(Vec values) {  // to the nearest, ties to even
    const Words bits = reinterpret_cast<Words>(values);
    const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, not_a_number = (bits >> 16) | 0x40;
    return __builtin_convertvector(values == values ? nearest : not_a_number, HalfWords);
}
#elif defined(FLOAT16) && defined(__F16C__) && !defined(__AVX512F__)  // GCC 12 converts vectors of these one by one
typedef __m128i_u RowVec;

inline Vec load(const Row* from) { return _mm256_cvtph_ps(*reinterpret_cast<const RowVec*>(from)); }
inline RowVec rounded(Vec values) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }
#else
typedef Row RowVec __attribute__((vector_size(LANES * sizeof(Row)), aligned(sizeof(Row)), may_alias));

inline Vec load(const Row* from) { return __builtin_convertvector(*reinterpret_cast<const RowVec*>(from), Vec); }
inline RowVec rounded(Vec values) { return __builtin_convertvector(values, RowVec); }
#endif

inline void store(Row* to, Vec values) { *reinterpret_cast<RowVec*>(to) = rounded(values); }

template <class Values>
inline void store_past_caches(void* to, Values values) {
#ifdef __AVX512F__
    if constexpr (sizeof(Values) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)values);
#endif
#ifdef __AVX__
    if constexpr (sizeof(Values) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)values);
#endif
#ifdef __SSE2__
    if constexpr (sizeof(Values) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)values);
#endif
    std::memcpy(to, &values, sizeof(Values));
}

// For what is too large to be found in a cache later: a store that misses them would read the line first. `to` is
// aligned to what is stored. Other threads see it after the writer's fence(), which Team has.
inline void stream(Row* to, Vec values) { store_past_caches(to, rounded(values)); }

// Working vectors are zero from C to the next multiple of LANES.
inline Vec load_work(const Acc* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store_work(Acc* to, Vec values) { *reinterpret_cast<LooseVec*>(to) = values; }
inline int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

#if defined(BFLOAT16) || defined(FLOAT16)
inline Vec load(const Acc* from) { return load_work(from); }
#endif

template <class Element>
inline Vec load_part(const Element* from, int64_t count) {
    Element whole[LANES] = {};
    std::memcpy(whole, from, count * sizeof(Element));
    return load(whole);
}

template <class Element>
inline Acc element(const Element* row, int64_t c) {
    return load_part(row + c, 1)[0];
}

inline void store_part(Row* to, Vec values, int64_t count) {
    Row whole[LANES];
    store(whole, values);
    std::memcpy(to, whole, count * sizeof(Row));
}

// Asks for a row soon to be read. Left alone, a CPU reads ahead to the end of a page, which is two rows of 512 float32;
// asked two rows ahead, passes over rows that are not in cache took a sixth less time.
template <class Element>
inline void ask_for(const Element* row, int64_t column, int64_t dim) {
    __builtin_prefetch(row + 2 * dim + column);
}

// The sum of so many lanes, by halves: one after the other they would take longer than the products of a short row.
template <int COUNT>
struct Lanewise {
    typedef Acc Values __attribute__((vector_size(COUNT * sizeof(Acc))));
    static Acc sum(Values values) {
        typename Lanewise<COUNT / 2>::Values halves[2];
        std::memcpy(halves, &values, sizeof(values));
        return Lanewise<COUNT / 2>::sum(halves[0] + halves[1]);
    }
};
template <>
struct Lanewise<1> {
    typedef Acc Values __attribute__((vector_size(sizeof(Acc))));
    static Acc sum(Values values) { return values[0]; }
};

inline Acc sum_of(const Vec (&sums)[UNROLLED]) {
    return Lanewise<LANES>::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// use(vector of the row, column, which of the UNROLLED sums) for all columns.
template <class Element, class Use>
inline void for_columns(const Element* row, int64_t dim, Use use) {
    int64_t c = 0;
    for (; c + UNROLLED * LANES <= dim; c += UNROLLED * LANES)
        for (int u = 0; u < UNROLLED; ++u) use(load(row + c + u * LANES), c + u * LANES, u);
    for (; c + LANES <= dim; c += LANES) use(load(row + c), c, 0);
    if (c < dim) use(load_part(row + c, dim - c), c, 1);
}

// These are not inlined, so that they round alike wherever they are called: equal rows have to be equally far, as ties
// are halved.
template <class Element>
[[gnu::noinline]] Acc product(const Element* row, const Acc* vector, int64_t dim) {
    Vec sums[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        sums[u] += x * load_work(vector + c);
    });
    return sum_of(sums);
}

// (x - origin) . vector
[[gnu::noinline]] Acc product_from(const Acc* origin, const Row* row, const Acc* vector, int64_t dim) {
    Vec sums[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        sums[u] += (x - load_work(origin + c)) * load_work(vector + c);
    });
    return sum_of(sums);
}

// |x - vector|^2, at most the type's largest number: 0 for equal rows, and for rows far from the origin as for others.
[[gnu::noinline]] Acc squared_distance(const Row* row, const Acc* vector, int64_t dim) {
    Vec sums[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        const Vec apart = x - load_work(vector + c);
        sums[u] += apart * apart;
    });
    return std::min(sum_of(sums), std::numeric_limits<Acc>::max());
}

inline bool is_finite(const Row* row, int64_t dim) {
    Vec sum = {};
    for_columns(row, dim, [&](Vec x, int64_t, int) { sum += x * 0; });
    for (int lane = 0; lane < LANES; ++lane)
        if (sum[lane] != 0) return false;
    return true;
}

// |x| of a row with such a sum of squares, also where that left the type's range, as hypot.
template <class Element>
inline Acc norm_from(Acc square, const Element* row, int64_t dim) {
    if (square > LEAST_SQUARE && square < 1 / LEAST_SQUARE) return std::sqrt(square);
    Acc largest = 0, total = 0;
    for (int64_t c = 0; c < dim; ++c) {
        const Acc size = std::abs(element(row, c));
        largest = size <= largest ? largest : size;  // NaN stays
    }
    if (!(largest > 0 && largest < INFINITE)) return largest;
    for (int64_t c = 0; c < dim; ++c) {
        const Acc part = element(row, c) / largest;
        total += part * part;
    }
    return largest * std::sqrt(total);
}

template <class Element>
[[gnu::noinline]] Acc norm_of(const Element* row, int64_t dim) {
    Vec sums[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        sums[u] += x * x;
    });
    return norm_from(sum_of(sums), row, dim);
}

// The two, to the bit, in one pass: of rows that come from memory the product takes no time of its own.
template <class Element>
[[gnu::noinline]] std::pair<Acc, Acc> norm_and_product(const Element* row, const Acc* vector, int64_t dim) {
    Vec squares[UNROLLED] = {}, products[UNROLLED] = {};
    for_columns(row, dim, [&](Vec x, int64_t c, int u) {
        ask_for(row, c, dim);
        squares[u] += x * x;
        products[u] += x * load_work(vector + c);
    });
    return {norm_from(sum_of(squares), row, dim), sum_of(products)};
}

// A row times 2^-exponent, in two steps, as the power itself may leave the type's range.
inline void copy_row(const Row* row, Acc* to, int64_t dim, int exponent) {
    const int half = exponent / 2;
    const Acc first = std::scalbn(Acc(1), -half), second = std::scalbn(Acc(1), half - exponent);
    for_columns(row, dim, [&](Vec x, int64_t c, int) { store_work(to + c, x * first * second); });
}

// Two weighted sums of the same rows, four rows at a time, as each then reads and writes a quarter of the sums.
struct WeightedSums {
    Acc *first, *second;  // which the sums are added to
    int64_t dim;
    const Acc* origin;  // which is taken from each row; null for 0
    const Row* rows[4];
    Acc weights[2][4];
    int pending = 0;

    WeightedSums(Acc* first, Acc* second, int64_t dim, const Acc* origin = nullptr)
        : first(first), second(second), dim(dim), origin(origin) {}

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
            const Vec from = origin ? load_work(origin + c) : Vec{};
            for (int r = 0; r < 4; ++r) {
                const Vec x = load_row(rows[r] + c) - from;
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

}  // namespace fcn_kernels
