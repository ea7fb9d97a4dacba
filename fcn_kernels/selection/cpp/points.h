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

template <int DIM, class Use>
void squared_distances(const Acc* columns, int64_t stride, int64_t begin, int64_t end, const Acc* point, Use use) {
    const Vec most = Vec{} + std::numeric_limits<Acc>::max();
    Acc at[DIM];
    std::copy_n(point, DIM, at);
    for (int64_t i = begin; i < end; i += LANES) {
        Vec sum = {};
        for (int c = 0; c < DIM; ++c) {
            const Vec difference = load_work(columns + c * stride + i) - at[c];
            sum += difference * difference;
        }
        use(sum < most ? sum : most, i);
    }
}

// use(squared distances to a point, the first row) for rows [begin, end) of columns (dim, stride), a vector of them at
// a time.
template <class Use>
void squared_distances(int64_t dim, const Acc* columns, int64_t stride, int64_t begin, int64_t end, const Acc* point,
                       Use use) {
    switch (dim) {
        case 1:
            return squared_distances<1>(columns, stride, begin, end, point, use);
        case 2:
            return squared_distances<2>(columns, stride, begin, end, point, use);
        case 3:
            return squared_distances<3>(columns, stride, begin, end, point, use);
        case 4:
            return squared_distances<4>(columns, stride, begin, end, point, use);
        case 5:
            return squared_distances<5>(columns, stride, begin, end, point, use);
        case 6:
            return squared_distances<6>(columns, stride, begin, end, point, use);
        case 7:
            return squared_distances<7>(columns, stride, begin, end, point, use);
        default:
            return squared_distances<8>(columns, stride, begin, end, point, use);
    }
}

class Points {
  public:
    static constexpr int64_t MOST_DIM = 8;
    const int64_t dim;

    Points(int64_t rows, int64_t dim) : dim(dim), stride(padded(rows)), columns(dim * stride) {}

    explicit operator bool() const { return stride > 0; }
    Acc at(int64_t i, int64_t c) const { return columns[c * stride + i]; }

    // null: a row that is not compared
    void set(int64_t i, const Row* row) {
        for (int64_t c = 0; c < dim; ++c) columns[c * stride + i] = row ? element(row, c) : 0;
    }

    // As squared_distances.
    template <class Use>
    void meet(int64_t begin, int64_t end, const Acc* point, Use use) const {
        squared_distances(dim, columns.data(), stride, begin, end, point, use);
    }

  private:
    const int64_t stride;
    std::vector<Acc> columns;  // (dim, stride)
};

}  // namespace fcn_kernels
