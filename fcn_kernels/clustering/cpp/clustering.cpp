// Chunks from rows to sums, for float32 sums: the transformer blocks, the shares and the weighted sums.
//
// Weights are packed into panels that stay in L1 while tokens pass; tokens stay in L2 from one attention to the next.
// The products are our own, as a library's last bits depend on the batch.

#include "forward.h"

using namespace fcn_kernels;

EXPORTED int forward(const Call* call, const Clustered* out) {
    return guarded(*call, [&](const Call& c) { Forward(c, *out).run(); });
}
