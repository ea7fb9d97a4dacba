// Chunks from rows to sums, for float32 sums: the transformer blocks, the shares and the weighted sums.
//
// Weights are packed into panels that stay in L1 while tokens pass; tokens stay in L2 from one attention to the next.
// The products are our own, as a library's last bits depend on the batch.

#include "fold.h"
#include "forward.h"
#include "fuse.h"

using namespace fcn_kernels;

EXPORTED int forward(const Call* call, const Clustered* out) {
    return guarded(*call, [&](const Call& c) { Forward(c, *out).run(); });
}

// Mixers (depth) stand behind the results.
EXPORTED int fuse(const FuseCall* call, const Fused* out, const Mixer* mixers) {
    return guarded(*call, [&](const FuseCall& c) { fuse(c, mixers, *out); });
}

struct Many {
    int64_t count, threads;
};

EXPORTED int fold(const Many* call, const Given* layers) {
    return guarded(*call, [&](const Many& c) {
        for (int64_t i = 0; i < c.count; ++i) fold(layers[i]);
    });
}

EXPORTED int sample(const Many* call, const Sampled* tensors, uint64_t* out) {
    return guarded(*call, [&](const Many& c) { *out = sample(tensors, c.count); });
}
