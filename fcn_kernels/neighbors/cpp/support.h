// What is kept of a row's scores: the k best, or the moments of all.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "product.h"

namespace fcn_kernels {

struct Entry {
    Acc score;
    int32_t place;  // bank row, from the first that a walk sees
};

inline bool is_better(const Entry& a, const Entry& b) {
    return a.score > b.score || (a.score == b.score && a.place < b.place);
}

// Count, mean, and sum of squares about it.
struct Moments {
    int64_t count = 0;
    double mean = 0, squares = 0;

    void add(const Moments& other) {  // Chan, Golub and LeVeque 1979
        if (other.count == 0) return;
        const double apart = other.mean - mean, share = double(other.count) / double(count + other.count);
        squares += other.squares + apart * apart * share * double(count);
        mean += apart * share;
        count += other.count;
    }
};

template <class Value>
Moments moments_of(int64_t count, Value value) {
    Moments m;
    m.count = count;
    for (int64_t i = 0; i < count; ++i) m.mean += value(i);
    if (count) m.mean /= double(count);
    for (int64_t i = 0; i < count; ++i) m.squares += (value(i) - m.mean) * (value(i) - m.mean);
    return m;
}

// The k best entries of each of some rows. Scores that beat the row's threshold are appended; when its room is full, it
// is cut to k, whose worst is the next threshold. Places come in rising order, so that a tie with the worst has lost.
class Nearest {
  public:
    Nearest(int64_t rows, int64_t k, int64_t room, Acc least)
        : k(k), room(room), entries(rows * room), sizes(rows), thresholds(rows, below(least)) {}

    static int64_t room_for(int64_t k, int64_t bank) { return std::max<int64_t>(1, std::min(2 * k + 32, bank)); }

    Acc threshold(int64_t row) const { return thresholds[row]; }

    void append(int64_t row, Entry entry) {
        entries[row * room + sizes[row]++] = entry;
        if (sizes[row] == room) cut(row);
    }

    // The first is the best.
    const Entry* sorted(int64_t row) {
        cut(row);
        Entry* first = entries.data() + row * room;
        std::sort(first, first + sizes[row], is_better);
        return first;
    }

    int64_t size(int64_t row) const { return sizes[row]; }

    // To the k best, of which it returns how many there are. The threshold is the worst of k.
    int64_t cut(int64_t row) {
        if (sizes[row] < k) return sizes[row];
        Entry* first = entries.data() + row * room;
        std::nth_element(first, first + (k - 1), first + sizes[row], is_better);
        sizes[row] = k;
        thresholds[row] = first[k - 1].score;
        return k;
    }

  private:
    int64_t k, room;
    std::vector<Entry> entries;
    std::vector<int64_t> sizes;
    std::vector<Acc> thresholds;

    // What is above this is at least `least`.
    static Acc below(Acc least) { return std::nextafter(least, -INFINITE); }
};

}  // namespace fcn_kernels
