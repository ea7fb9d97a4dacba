// A layer over tokens: a matrix product in which every value is summed by itself, input after input, so that what a
// token gets depends on itself alone. A library's product gives it other last bits in another batch.

#pragma once

#include <algorithm>
#include <cstdint>

#include "aligned.h"
#include "columns.h"

namespace fcn_kernels {

// A tile has as many sums as registers hold beside what they are made of: 24 of 32, or 12 of 16.
constexpr int64_t TILE_ROWS = BYTES == 64 ? 12 : 6, VECTORS = 2, TILE_OUTPUTS = VECTORS * LANES;
constexpr int64_t INPUTS = 128;  // at a time: their part of a panel stays in L1

inline int64_t whole_tiles(int64_t outputs) { return (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS * TILE_OUTPUTS; }

// Of the panels of a layer among others, on any CPU.
inline int64_t panel_room(int64_t inputs, int64_t outputs) { return inputs * ((outputs + 31) / 32 * 32); }

// out[r] (+)= x[r] panel, for USED rows and TILE_OUTPUTS outputs; from `bias`, or on from what is there.
template <int USED>
inline void multiply(const Acc* x, int64_t stride, const Acc* panel, int64_t inputs, const Acc* bias, Acc* out,
                     int64_t out_stride) {
    Vec sums[USED][VECTORS];
    for (int r = 0; r < USED; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load_work((bias ? bias : out + r * out_stride) + v * LANES);
    for (int64_t i = 0; i < inputs; ++i) {
        const Vec first = load_work(panel + i * TILE_OUTPUTS), second = load_work(panel + i * TILE_OUTPUTS + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < USED; ++r) {
            const Acc e = x[r * stride + i];
            sums[r][0] += e * first;
            sums[r][1] += e * second;
        }
    }
    for (int r = 0; r < USED; ++r)
        for (int v = 0; v < VECTORS; ++v) store_work(out + r * out_stride + v * LANES, sums[r][v]);
}

// weight (inputs, outputs) to panels [panel][input][output], of 0 beyond the last output.
inline void pack(const Acc* weight, int64_t inputs, int64_t outputs, Acc* panels) {
    for (int64_t at = 0; at < outputs; at += TILE_OUTPUTS) {
        const int64_t count = std::min(TILE_OUTPUTS, outputs - at);
        for (int64_t i = 0; i < inputs; ++i) {
            Acc* const to = panels + at * inputs + i * TILE_OUTPUTS;
            std::copy_n(weight + i * outputs + at, count, to);
            std::fill(to + count, to + TILE_OUTPUTS, Acc(0));
        }
    }
}

class Layer {
  public:
    // weight (inputs, outputs), bias (outputs); outputs beyond them, up to whole tiles, are `beyond`. With the panels
    // of the weight, which then outlive the layer, nothing is packed.
    Layer(const Acc* weight, const Acc* bias, int64_t inputs, int64_t outputs, const Acc* packed = nullptr,
          Acc beyond = 0)
        : inputs(inputs),
          outputs(whole_tiles(outputs)),
          room(packed ? 0 : inputs * whole_tiles(outputs)),
          panels(packed ? packed : room),
          biases(whole_tiles(outputs)) {
        std::copy_n(bias, outputs, biases + 0);
        std::fill(biases + outputs, biases + this->outputs, beyond);
        if (!packed) pack(weight, inputs, outputs, room);
    }

    // Rows by strides; both have room for whole tiles of rows and of outputs.
    void apply(const Acc* x, int64_t stride, int64_t rows, Acc* out, int64_t out_stride) const {
        for (int64_t at = 0; at < outputs; at += TILE_OUTPUTS)
            for (int64_t begin = 0; begin < inputs; begin += INPUTS) {
                const Acc* panel = panels + at * inputs + begin * TILE_OUTPUTS;
                const Acc* bias = begin ? nullptr : biases + at;
                const int64_t count = std::min(INPUTS, inputs - begin);
                for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                    const Acc* from = x + r * stride + begin;
                    Acc* to = out + r * out_stride + at;
                    if (rows - r <= TILE_ROWS / 3)
                        multiply<TILE_ROWS / 3>(from, stride, panel, count, bias, to, out_stride);
                    else
                        multiply<TILE_ROWS>(from, stride, panel, count, bias, to, out_stride);
                }
            }
    }

  private:
    const int64_t inputs, outputs;
    const Aligned room;
    const Acc* const panels;
    const Aligned biases;
};

}  // namespace fcn_kernels
