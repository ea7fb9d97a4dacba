// How a compiled function is entered and left: with threads that can be had, and without an exception.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <future>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

#define EXPORTED extern "C" [[gnu::visibility("default")]]

namespace fcn_kernels {

// Elements of rows below which waking the other threads for a pass over them, some 5 us, costs more than it gives.
constexpr int64_t LEAST_SHARED = 64 << 10;

// What a function returns: no exception may leave it.
enum Status : int { DONE, OUT_OF_MEMORY, FAILED };

// Keeps the first exception of a parallel loop, which must not leave it, until after.
class Caught {
  public:
    template <class Work>
    void run(Work work) noexcept {
        try {
            work();
        } catch (...) {
#pragma omp critical(fcn_kernels_caught)
            if (!first) first = std::current_exception();
        }
    }
    void rethrow() const {
        if (first) std::rethrow_exception(first);
    }

  private:
    std::exception_ptr first;
};

// Whether so many threads can be had. OpenMP ends the process where it cannot start one, so it is tried first.
inline bool can_start(int64_t threads) {
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

// work(call) of a call that asks for so many threads, or for one where these cannot be had.
template <class Call, class Work>
Status guarded(const Call& asked, Work work) noexcept {
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

}  // namespace fcn_kernels
