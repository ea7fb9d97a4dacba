// Coreset selection and its gradient on a CPU, for rows of one type: launch.py has this compiled with ROW naming it.
//
// The algorithm is torch_backend.py's, row by row instead of operation by operation, so that a row is read once a step
// while it is in cache, and many rows not at all: the running minimum only falls, so in inference a row is compared
// with a pick only when its distance to the picks before could still make it the farthest. Points of up to 8
// coordinates are compared a register of them at a time (points.h), and where there are many, only those near a pick
// (buckets.h).
//
// Sets go to threads whole, or, where a set is a large part of all the work, in blocks of rows. Blocks depend on the
// set's size alone, and so does every sum: the same input gives the same bits on any number of threads.

#include <vector>

#include "backward.h"
#include "forward.h"

using namespace fcn_kernels;

EXPORTED int forward(const Call* call, const Selected* out) {
    return guarded(*call, [&](const Call& c) { for_sets(c, [&](const Set& set) { Selection(set, *out).run(); }); });
}

// grad (B, K, C) -> dx (R, C), dq (R,), dgamma.
EXPORTED int backward(const Call* call, const Selected* saved, const Acc* grad, Row* dx, Acc* dq, Acc* dgamma) {
    return guarded(*call, [&](const Call& c) {
        ask_for_large_pages(dx, c.all_rows * c.dim);
        std::vector<double> parts(c.sets);
        for_sets(c, [&](const Set& set) { parts[set.number] = Backpropagation(set, *saved, grad, dx, dq).run(); });
        double total = 0;
        for (const double part : parts) total += part;
        *dgamma = Acc(total);
    });
}
