// Loops that threads share, and that a thread which the machine has taken away holds up as little as can be.
//
// With a barrier after each loop, as OpenMP's own loops have one, everybody waits for the last. Where other processes
// want the cores too, the last has been taken from its core, for milliseconds, and the others spin all the while:
// selection of 50 of 200,000 rows of 64 took ten times longer on two threads than on one.

#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "calls.h"

namespace fcn_kernels {

// Before a thread says that its work is done: what it stored past the caches is there for others, too.
inline void fence() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

inline int64_t nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whether helpers are worth waiting for: what they have saved lately, less twice what waiting for them has cost. Where
// that falls below 0, threads do without one another for a while, so that of all the time waiting takes little. All
// calls share one account; how exact it is does not matter.
class Account {
  public:
    static bool allows_help() { return resume <= 0 || nanoseconds() >= resume; }

    static void add(int64_t saved, int64_t waited) {
        const int64_t sum = std::min(balance + saved - 2 * waited, MOST);
        if (sum < 0) resume = nanoseconds() - REST * sum;
        balance = std::max<int64_t>(sum, 0);
    }

  private:
    static constexpr int64_t MOST = 20'000'000, REST = 16;
    static inline std::atomic<int64_t> balance{MOST}, resume{0};
};

// One parallel region for all loops of a call. Its first thread runs the call, and the others help with its loops.
// Each has a share of a loop's pieces, the same in each loop, which its cache may still hold, and takes of the others'
// when that is done. So nobody waits for a helper that has not come, only for pieces that were begun; and who waits
// spins for a moment and then sleeps, which leaves its core to those it waits for.
class Team {
  public:
    // body(team)
    template <class Body>
    static void run(int64_t threads, Body body) {
        if (threads == 1 || !Account::allows_help()) {
            Team alone(1);
            return body(alone);
        }
        Team team(threads);
        Caught caught;
#pragma omp parallel num_threads(threads)
        if (omp_get_thread_num() == 0) {
            team.helpers = omp_get_num_threads() - 1;
            caught.run([&] { body(team); });
            team.dismiss();
        } else {
            team.help(omp_get_thread_num());
        }
        caught.rethrow();
    }

    // work(piece) for the pieces [0, count).
    template <class Work>
    void for_each(int64_t count, Work work) {
        if (helpers == 0 || count <= 1 || !Account::allows_help()) {
            for (int64_t piece = 0; piece < count; ++piece) work(piece);
            return;
        }
        Caught caught;
        const auto guarded = [&](int64_t piece) { caught.run([&] { work(piece); }); };
        call = [](const void* callable, int64_t piece) { (*static_cast<decltype(guarded)*>(callable))(piece); };
        argument = &guarded;
        pieces = count;
        const int64_t begin = nanoseconds();
        announce();
        int64_t own = 0;
        while (take(0)) ++own;
        const int64_t end = nanoseconds();
        wait_until(finished, uint32_t(count));
        Account::add(own ? (end - begin) / own * (count - own) : 0, nanoseconds() - end);
        caught.rethrow();
    }

  private:
    static constexpr int64_t SPIN = 50'000, SPIN_IDLE = 300'000;  // ns; it takes about the former to wake a thread
    static constexpr int LOOP = 32;                               // bits

    // The loop's number, and the pieces of the share that nobody has taken yet: who takes one knows that its loop is
    // not over until it is done.
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };

    int64_t helpers = 0;
    void (*call)(const void*, int64_t) = nullptr;
    const void* argument = nullptr;
    int64_t pieces = 0;
    std::vector<Share> shares;
    std::atomic<uint32_t> finished{0}, loops{0}, gone{0};
    std::atomic<bool> over{false};

    explicit Team(int64_t threads) : shares(threads) {}

    int64_t start_of(int64_t share) const { return pieces * share / int64_t(shares.size()); }

    void announce() {
        finished = 0;
        for (int64_t s = 0; s < int64_t(shares.size()); ++s)
            shares[s].left = uint64_t(loops + 1) << LOOP | uint64_t(start_of(s + 1) - start_of(s));
        ++loops;
        loops.notify_all();
    }

    // Does one piece, of the thread's own share if there is one; false if there is none anywhere.
    bool take(int64_t thread) {
        const int64_t count = shares.size();
        for (int64_t t = 0; t < count; ++t) {
            const int64_t s = (thread + t) % count;
            uint64_t left = shares[s].left;
            while (uint32_t(left) && !shares[s].left.compare_exchange_weak(left, left - 1)) {
            }
            if (uint32_t(left) == 0) continue;
            const uint32_t all = uint32_t(pieces);  // with its last piece a loop is over
            call(argument, start_of(s + 1) - uint32_t(left));
            fence();
            if (++finished == all) finished.notify_one();
            return true;
        }
        return false;
    }

    void help(int64_t thread) {
        for (uint32_t seen = 0; !over;) {
            while (take(thread)) {
            }
            for (const int64_t begin = nanoseconds(); loops == seen && nanoseconds() - begin < SPIN_IDLE;) {
            }
            loops.wait(seen);
            seen = loops;
        }
        if (++gone == uint32_t(helpers)) gone.notify_one();
    }

    void dismiss() {
        const int64_t begin = nanoseconds();
        over = true;
        ++loops;
        loops.notify_all();
        wait_until(gone, uint32_t(helpers));
        Account::add(0, nanoseconds() - begin);
    }

    static void wait_until(const std::atomic<uint32_t>& value, uint32_t wanted) {
        const int64_t begin = nanoseconds();
        for (uint32_t seen; (seen = value) != wanted;)
            if (nanoseconds() - begin > SPIN) value.wait(seen);
    }
};

}  // namespace fcn_kernels
