// Short rows, column by column: a vector register holds a column of many rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "columns.h"

namespace fcn_kernels {

using Lanes = decltype(Vec{} < Vec{});
using Lane = std::remove_reference_t<decltype(Lanes{}[0])>;

class Points {
  public:
    static constexpr int64_t MOST_DIM = 8;

    Points(int64_t rows, int64_t dim) : dim(dim), stride(padded(rows)), columns(dim * stride) {}

    explicit operator bool() const { return stride > 0; }

    // null: a row that is not compared
    void set(int64_t i, const Row* row) {
        for (int64_t c = 0; c < dim; ++c) columns[c * stride + i] = row ? element(row, c) : 0;
    }

    // use(squared distances to a point, the first row) for rows [begin, end), a vector of them at a time.
    template <class Use>
    void meet(int64_t begin, int64_t end, const Acc* point, Use use) const {
        switch (dim) {
            case 1:
                return meet_in<1>(begin, end, point, use);
            case 2:
                return meet_in<2>(begin, end, point, use);
            case 3:
                return meet_in<3>(begin, end, point, use);
            case 4:
                return meet_in<4>(begin, end, point, use);
            case 5:
                return meet_in<5>(begin, end, point, use);
            case 6:
                return meet_in<6>(begin, end, point, use);
            case 7:
                return meet_in<7>(begin, end, point, use);
            default:
                return meet_in<8>(begin, end, point, use);
        }
    }

  private:
    int64_t dim, stride;
    std::vector<Acc> columns;  // (dim, stride)

    template <int DIM, class Use>
    void meet_in(int64_t begin, int64_t end, const Acc* point, Use use) const {
        const Vec most = Vec{} + std::numeric_limits<Acc>::max();
        const Acc* const from = columns.data();
        const int64_t apart = stride;
        Acc at[DIM];
        std::copy_n(point, DIM, at);
        for (int64_t i = begin; i < end; i += LANES) {
            Vec sum = {};
            for (int c = 0; c < DIM; ++c) {
                const Vec difference = load_work(from + c * apart + i) - at[c];
                sum += difference * difference;
            }
            use(sum < most ? sum : most, i);
        }
    }
};

}  // namespace fcn_kernels
