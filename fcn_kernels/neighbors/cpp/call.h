// What a call brings.

#pragma once

#include <cstdint>

#include "columns.h"

namespace fcn_kernels {

// Pointers are null for what is not given; see problem.py.
struct Asked {
    const Acc* rows;  // (N, C), as given
    const Row* bank;  // (M, C), as given
    const int64_t *ids, *bank_ids;
    int64_t n, m, dim, stride, k, normalized, filter, threads;
    double least;
};

struct Call : Asked {
    const Acc* units;  // (N, C), the rows over their norms, or as given where they are called unit; 0 for unusable ones
    const Acc* norms;  // (N,)
};

}  // namespace fcn_kernels
