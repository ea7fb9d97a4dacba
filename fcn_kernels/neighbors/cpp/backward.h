// Gradients of rows and bank from the k bank rows of each row. ds_ij = weight_i + slope_i (s_ij - mu_i).

#pragma once

#include <cstdint>
#include <vector>

#include "call.h"
#include "calls.h"
#include "units.h"

namespace fcn_kernels {

struct Arriving {  // (N,), and the indices (N, k) of the forward pass
    const Acc *weight, *slope, *mean;
    const int64_t* indices;
};

class Backpropagation {
  public:
    Backpropagation(const Call& call, const Arriving& arriving)
        : call(call),
          arriving(arriving),
          threads(call.n * call.k * call.dim < LEAST_SHARED ? 1 : call.threads),
          ds(call.n * call.k) {}

    // drows (N, C), or null where they are not wanted: the bank's gradient wants `ds` all the same.
    void to_rows(Acc* drows) {
        Caught caught;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
        for (int64_t i = 0; i < call.n; ++i) caught.run([&] { to_row(i, drows ? drows + i * call.dim : nullptr); });
        caught.rethrow();
    }

    void to_bank(Row* dbank) {
        sort_pairs();
        Caught caught;
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
        for (int64_t j = 0; j < call.m; ++j) caught.run([&] { to_bank_row(j, dbank + j * call.dim); });
        caught.rethrow();
    }

  private:
    const Call& call;
    const Arriving& arriving;
    const int64_t threads;
    std::vector<Acc> ds;                 // (N, k)
    std::vector<int64_t> starts, pairs;  // those of bank row j, in the order of i: pairs[starts[j]] and on

    const Row* bank_row(int64_t j) const { return call.bank + j * call.stride; }
    Acc norm_of_bank_row(int64_t j) const { return call.normalized ? Acc(1) : norm_of(bank_row(j), call.dim); }

    void to_row(int64_t i, Acc* drow) {
        const Acc* u = call.units + i * call.dim;
        std::vector<Acc> unit(padded(call.dim)), du(padded(call.dim));
        std::copy(u, u + call.dim, unit.begin());
        const int64_t* places = arriving.indices + i * call.k;
        for (int64_t t = 0; t < call.k && places[t] >= 0; ++t) {
            if (t + 2 < call.k && places[t + 2] >= 0) fetch(bank_row(places[t + 2]));
            const Row* row = bank_row(places[t]);
            const Acc norm = norm_of_bank_row(places[t]), score = product(row, unit.data(), call.dim) / norm;
            const Acc weight = arriving.weight[i] + arriving.slope[i] * (score - arriving.mean[i]);
            ds[i * call.k + t] = weight;
            const Acc share = weight / norm;
            if (drow)
                for_columns(row, call.dim,
                            [&](Vec x, int64_t c, int) { store_work(&du[c], load_work(&du[c]) + share * x); });
        }
        if (!drow) return;
        const Acc norm = call.norms[i];
        const bool projected = !call.normalized && is_usable(norm);
        Acc along = 0;
        for (int64_t c = 0; projected && c < call.dim; ++c) along += du[c] * u[c];
        for (int64_t c = 0; c < call.dim; ++c) drow[c] = projected ? (du[c] - along * u[c]) / norm : du[c];
    }

    void fetch(const Row* row) const {
        constexpr int64_t LINE = 64 / sizeof(Row);
        for (int64_t c = 0; c < call.dim; c += LINE) __builtin_prefetch(row + c);
    }

    void sort_pairs() {
        starts.assign(call.m + 1, 0);
        const int64_t count = call.n * call.k;
        for (int64_t p = 0; p < count; ++p)
            if (arriving.indices[p] >= 0) ++starts[arriving.indices[p] + 1];
        for (int64_t j = 0; j < call.m; ++j) starts[j + 1] += starts[j];
        pairs.resize(starts[call.m]);
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t p = 0; p < count; ++p)
            if (arriving.indices[p] >= 0) pairs[next[arriving.indices[p]]++] = p;
    }

    void to_bank_row(int64_t j, Row* to) const {
        std::vector<Acc> dv(padded(call.dim)), v(padded(call.dim));
        const bool any = starts[j] < starts[j + 1];
        for (int64_t s = starts[j]; s < starts[j + 1]; ++s) {
            const Acc* u = call.units + pairs[s] / call.k * call.dim;
            const Acc weight = ds[pairs[s]];
            for (int64_t c = 0; c < call.dim; ++c) dv[c] += weight * u[c];
        }
        Acc norm = 1, along = 0;
        if (any && !call.normalized) {
            norm = norm_of_bank_row(j);
            copy_unit(bank_row(j), call.dim, norm, v.data());
            for (int64_t c = 0; c < call.dim; ++c) along += dv[c] * v[c];
        }
        for (int64_t c = 0; c < call.dim; c += LANES) {
            const Vec value = (load_work(&dv[c]) - along * load_work(&v[c])) / norm;
            store_part(to + c, value, std::min<int64_t>(LANES, call.dim - c));
        }
    }
};

}  // namespace fcn_kernels
