// Coreset selection and its gradient on a CPU, for rows of one type: launch.py has this compiled with ROW naming it.
//
// The algorithm is torch_backend.py's, row by row instead of operation by operation, so that a row is read once a step
// while it is in cache, and many rows not at all: the running minimum only falls, so in inference a row is compared
// with a pick only when its distance to the picks before could still make it the farthest.
//
// Sets go to threads whole, or, where a set is a large part of all the work, in blocks of rows. Blocks depend on the
// set's size alone, and so does every sum: the same input gives the same bits on any number of threads.

#include <atomic>
#include <future>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "backward.h"
#include "forward.h"

#define EXPORTED extern "C" [[gnu::visibility("default")]]

using namespace fcn_kernels;

// What a function returns: no exception may leave it.
enum Status : int { DONE, OUT_OF_MEMORY, FAILED };

// Whether so many threads can be had. OpenMP ends the process where it cannot start one, so it is tried first.
static bool can_start(int64_t threads) {
    static std::atomic<int64_t> proven{1};
    if (threads <= proven) return true;
    std::promise<void> all_started;
    const std::shared_future<void> end = all_started.get_future().share();
    std::vector<std::thread> tried;
    bool started = true;
    try {
        for (int64_t t = 1; t < threads; ++t) tried.emplace_back([end] { end.wait(); });
    } catch (...) {
        started = false;
    }
    all_started.set_value();
    for (std::thread& thread : tried) thread.join();
    if (started) proven = threads;
    return started;
}

template <class Work>
static Status guarded(const Call& asked, Work work) noexcept {
    try {
        Call call = asked;
        if (!can_start(call.threads)) call.threads = 1;
        work(call);
        return DONE;
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    } catch (const std::length_error&) {
        return OUT_OF_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

EXPORTED int forward(const Call* call, const Selected* out) {
    return guarded(*call, [&](const Call& c) { for_sets(c, [&](const Set& set) { Selection(set, *out).run(); }); });
}

// grad (B, K, C) -> dx (R, C), dq (R,), dgamma.
EXPORTED int backward(const Call* call, const Selected* saved, const Acc* grad, Row* dx, Acc* dq, Acc* dgamma) {
    return guarded(*call, [&](const Call& c) {
        std::vector<double> parts(c.sets);
        for_sets(c, [&](const Set& set) { parts[set.number] = Backpropagation(set, *saved, grad, dx, dq).run(); });
        double total = 0;
        for (const double part : parts) total += part;
        *dgamma = Acc(total);
    });
}
