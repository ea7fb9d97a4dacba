// Nearest bank rows of other identities, and what their cosines say.
//
// A thread takes some rows past the bank. Bank rows are made unit and packed into panels that stay in L2; of each tile
// of scores only those that beat their row's threshold leave the registers' neighborhood, L1. The product is our own:
// a library's gives a score other last bits in another batch, so that equal bank rows would not tie. Where integers,
// or sums in another order, are faster they say first which scores can matter: filter.h.

#include "backward.h"
#include "forward.h"
#include "pages.h"
#include "units.h"

using namespace fcn_kernels;

EXPORTED int forward(const Asked* asked, const Statistics* out) {
    return guarded(*asked, [&](const Asked& a) {
        const UnitRows rows(a);
        forward(rows.call(), *out);
    });
}

// drows (N, C) and dbank (M, C); null where they are not wanted.
EXPORTED int backward(const Asked* asked, const Arriving* arriving, Acc* drows, Row* dbank) {
    return guarded(*asked, [&](const Asked& a) {
        const UnitRows rows(a);
        const Call call = rows.call();
        Backpropagation run(call, *arriving);
        ask_for_large_pages(drows, call.n * call.dim);
        ask_for_large_pages(dbank, call.m * call.dim);
        run.to_rows(drows);
        if (dbank) run.to_bank(dbank);
    });
}
