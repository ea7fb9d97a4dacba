// What a call brings.

#pragma once

#include <cstdint>

#include "columns.h"

namespace fcn_kernels {

// Pointers are null for what is not given; see problem.py.
struct Call {
    const Acc* rows;   // (N, C), unit
    const Acc* norms;  // (N,)
    const Row* bank;   // (M, C), as given
    const int64_t *ids, *bank_ids;
    int64_t n, m, dim, stride, k, normalized, filter, threads;
    double least;
};

}  // namespace fcn_kernels
