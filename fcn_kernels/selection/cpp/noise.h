// The Gumbel noise of noise.py, value by value.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sets.h"

namespace fcn_kernels {

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
    explicit Noise(const Set& set) : set(set), drawn(set.call.seed ? STEPS_PER_DRAW * set.n : 0, set.memory) {}

    // To be called for each step in turn.
    void advance(int64_t step) {
        const Call& call = set.call;
        if (call.noise) values = call.noise + step * call.all_rows + set.at;
        if (!call.seed) return;
        if (step % STEPS_PER_DRAW == 0) {
            const int64_t used = std::min<int64_t>(STEPS_PER_DRAW, call.k - step);
            const int64_t before = set.rows_before();
            set.for_blocks([&](int64_t, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    const Words4 words = philox(uint64_t(*call.seed), before + i, step / STEPS_PER_DRAW, set.number);
                    for (int64_t w = 0; w < used; ++w) drawn[w * set.n + i] = gumbel(words.word[w]);
                }
            });
        }
        values = drawn + step % STEPS_PER_DRAW * set.n;
    }

    Acc at(int64_t i) const { return values ? values[i] : 0; }

  private:
    const Set& set;
    Unset<Acc> drawn;
    const Acc* values = nullptr;
};

}  // namespace fcn_kernels
