// Room for vectors.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "columns.h"

namespace fcn_kernels {

// Blocks that a thread has used, for its next call: a fresh page costs more than what a small call computes in it.
class Kept {
  public:
    Kept() = default;
    Kept(const Kept&) = delete;
    ~Kept() {
        for (const Block& block : blocks) ::operator delete(block.place, ALIGNED);
    }

    void* take(size_t bytes) {
        for (Block& block : blocks)
            if (block.bytes == bytes) {
                void* const place = block.place;
                block = blocks.back();
                blocks.pop_back();
                total -= bytes;
                return place;
            }
        return ::operator new(bytes, ALIGNED);
    }

    void give(void* place, size_t bytes) noexcept {
        try {
            if (total + bytes > MOST) return ::operator delete(place, ALIGNED);
            blocks.push_back({place, bytes});
            total += bytes;
        } catch (...) {
            ::operator delete(place, ALIGNED);
        }
    }

  private:
    static constexpr size_t MOST = 16 << 20;
    static constexpr std::align_val_t ALIGNED = std::align_val_t(BYTES);
    struct Block {
        void* place;
        size_t bytes;
    };
    std::vector<Block> blocks;
    size_t total = 0;
};

inline thread_local Kept kept;

// Numbers that are not set yet, aligned to vectors. It is made and destroyed by one thread.
class Aligned {
  public:
    explicit Aligned(int64_t size)
        : bytes(std::max<int64_t>(size, 1) * sizeof(Acc)), values(static_cast<Acc*>(kept.take(bytes))) {}
    Aligned(const Aligned&) = delete;
    ~Aligned() { kept.give(values, bytes); }
    operator Acc*() const { return values; }
    void clear() const { std::fill_n(values, bytes / sizeof(Acc), Acc(0)); }

  private:
    const size_t bytes;
    Acc* const values;
};

}  // namespace fcn_kernels
