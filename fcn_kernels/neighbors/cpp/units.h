// A call's rows made unit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "call.h"
#include "calls.h"
#include "product.h"

namespace fcn_kernels {

class UnitRows {
  public:
    explicit UnitRows(const Asked& asked) : asked(asked), units(new Acc[asked.n * asked.dim]), norms(new Acc[asked.n]) {
        const int threads = asked.n * asked.dim < LEAST_SHARED ? 1 : asked.threads;
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < asked.n; ++i) {
            const Acc* row = asked.rows + i * asked.dim;
            const Acc norm = norms[i] = norm_of(row, asked.dim), over = asked.normalized ? 1 : norm;
            Acc* const unit = &units[i * asked.dim];
            for (int64_t c = 0; c < asked.dim; ++c) unit[c] = is_usable(norm) ? row[c] / over : 0;
        }
    }

    Call call() const { return {asked, units.get(), norms.get()}; }

  private:
    const Asked& asked;
    const std::unique_ptr<Acc[]> units, norms;
};

}  // namespace fcn_kernels
