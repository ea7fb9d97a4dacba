// The Gumbel noise of noise.py, value by value.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exponentials.h"
#include "sets.h"

namespace fcn_kernels {

constexpr int STEPS_PER_DRAW = 4;

// Of 32 bits, as the noise is of float32 whatever the rows are.
constexpr int DRAWN = BYTES / sizeof(float);
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int32_t Bits __attribute__((vector_size(BYTES)));
typedef float Floats __attribute__((vector_size(BYTES)));

struct Words4 {
    Words word[4];
};

// For rows `row` to `row` + DRAWN.
inline Words4 philox(uint64_t seed, uint32_t row, uint32_t block, uint32_t set) {
    typedef uint64_t Products __attribute__((vector_size(2 * BYTES)));
    Words c0 = Words{} + row, c1 = Words{} + block, c2 = Words{} + set, c3 = {};
    for (int lane = 0; lane < DRAWN; ++lane) c0[lane] += lane;
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const Products p0 = __builtin_convertvector(c0, Products) * 0xD2511F53u;
        const Products p2 = __builtin_convertvector(c2, Products) * 0xCD9E8D57u;
        c0 = __builtin_convertvector(p2 >> 32, Words) ^ c1 ^ key0;
        c1 = __builtin_convertvector(p2, Words);
        c2 = __builtin_convertvector(p0 >> 32, Words) ^ c3 ^ key1;
        c3 = __builtin_convertvector(p0, Words);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// log(x) + more for normal numbers x and a small number more, within an ulp. With x = 2^e (1 + f), s = f / (2 + f) and
// z = s^2, log(1 + f) = 2 s (1 + z / 3 + z^2 / 5 + ...), whose coefficients are fitted.
inline Floats log_of(Floats x, Floats more) {
    constexpr int32_t LEAST = 0x3f3504f3;  // sqrt(1/2), where 1 + f begins
    const Bits from_least = reinterpret_cast<Bits>(x) - LEAST;
    const Floats e = __builtin_convertvector(from_least >> 23, Floats);
    const Floats f = reinterpret_cast<Floats>((from_least & 0x7fffff) + LEAST) - 1, s = f / (2 + f), z = s * s;
    const Floats series = z * (0.66666685f + z * (0.3998875f + z * 0.2958100f)), half = 0.5f * f * f;
    return e * LN2_HIGH - ((half - (s * (half + series) + (e * LN2_LOW + more))) - f);
}

inline Floats gumbel(Words words) {
    const Floats drawn = (__builtin_convertvector(words, Floats) + 0.5f) * -0x1p-32f, most = Floats{} + (0x1p-24f - 1);
    const Floats minus_v = drawn > most ? drawn : most, u = 1 + minus_v;
    return -log_of(-log_of(u, (minus_v - (u - 1)) / u), Floats{});  // what rounding took from u is put back
}

class Noise {
  public:
    explicit Noise(const Set& set)
        : set(set),
          stride((set.n + DRAWN - 1) / DRAWN * DRAWN),
          drawn(set.call.seed ? STEPS_PER_DRAW * stride : 0, set.memory) {}

    // To be called for each step in turn.
    void advance(int64_t step) {
        const Call& call = set.call;
        if (call.noise) values = call.noise + step * call.all_rows + set.at;
        if (!call.seed) return;
        if (step % STEPS_PER_DRAW == 0) {
            const int64_t used = std::min<int64_t>(STEPS_PER_DRAW, call.k - step);
            const int64_t before = set.rows_before();
            set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i += DRAWN) {  // blocks are of whole vectors
                    const Words4 words = philox(uint64_t(*call.seed), before + i, step / STEPS_PER_DRAW, set.number);
                    for (int64_t w = 0; w < used; ++w) {
                        const Floats noise = gumbel(words.word[w]);
                        for (int lane = 0; lane < DRAWN; ++lane) drawn[w * stride + i + lane] = noise[lane];
                    }
                }
            });
        }
        values = drawn + step % STEPS_PER_DRAW * stride;
    }

    Acc at(int64_t i) const { return values ? values[i] : 0; }

  private:
    const Set& set;
    const int64_t stride;  // of a step's values
    Unset<Acc> drawn;
    const Acc* values = nullptr;
};

}  // namespace fcn_kernels
