// Layers with the LayerNorms before them folded in, as the forward pass takes them: weights by inputs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "layer.h"
#include "numbers.h"
#include "transpose.h"

namespace fcn_kernels {

// y = (x gain + shift) weight^T + bias, of which the first `scaled` outputs are multiplied by `scale`.
struct Given {
    const Acc *weight, *bias;  // (outputs, inputs), (outputs,)
    const Acc *gain, *shift;   // (inputs,), null for 1 and 0
    Acc *to, *to_bias;         // (inputs, outputs), (outputs,)
    Acc* panels;               // what layer.h packs of it
    int64_t inputs, outputs, scaled;
    double scale;
};

// A little of some tensors: all of small ones, and every STEP-th number of others. It tells an update in place, which
// PyTorch does not count where it is made through `.data`.
struct Sampled {
    const Acc* from;
    int64_t size;
};

inline uint64_t sample(const Sampled* tensors, int64_t count) {
    constexpr int64_t SMALL = 1024, STEP = 509;
    uint64_t mixed = 1469598103934665603u;  // Fowler, Noll and Vo
    for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < tensors[t].size; i += tensors[t].size <= SMALL ? 1 : STEP) {
            uint32_t bits;
            std::memcpy(&bits, tensors[t].from + i, sizeof bits);
            mixed = (mixed ^ bits) * 1099511628211u;
        }
    return mixed;
}

inline Acc scale_of(const Given& g, int64_t output) { return output < g.scaled ? Acc(g.scale) : Acc(1); }

// A square of LANES outputs and inputs.
inline void fold_square(const Given& g, int64_t output, int64_t input) {
    const Vec gain = g.gain ? load_work(g.gain + input) : fill(1);
    Vec square[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k)
        square[k] = load_work(g.weight + (output + k) * g.inputs + input) * gain * scale_of(g, output + k);
    transpose(square);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) store_work(g.to + (input + k) * g.outputs + output, square[k]);
}

inline void fold(const Given& g) {
    const int64_t outputs = g.outputs / LANES * LANES, inputs = g.inputs / LANES * LANES;
    for (int64_t o = 0; o < outputs; o += LANES)
        for (int64_t i = 0; i < inputs; i += LANES) fold_square(g, o, i);
    for (int64_t o = 0; o < g.outputs; ++o)  // what fills no square
        for (int64_t i = o < outputs ? inputs : 0; i < g.inputs; ++i)
            g.to[i * g.outputs + o] = g.weight[o * g.inputs + i] * (g.gain ? g.gain[i] : Acc(1)) * scale_of(g, o);
    pack(g.to, g.inputs, g.outputs, g.panels);
    for (int64_t o = 0; o < g.outputs; ++o) {
        const Acc* const row = g.weight + o * g.inputs;
        Vec sums = {};
        Acc sum = g.bias[o];
        int64_t i = 0;
        for (; g.shift && i + LANES <= g.inputs; i += LANES) sums += load_work(row + i) * load_work(g.shift + i);
        for (; g.shift && i < g.inputs; ++i) sum += row[i] * g.shift[i];
        g.to_bias[o] = (sum + sum_of_lanes(sums)) * scale_of(g, o);
    }
}

}  // namespace fcn_kernels
