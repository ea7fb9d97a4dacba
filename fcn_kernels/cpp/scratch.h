// Memory for one set's work.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>

namespace fcn_kernels {

// A small set's vectors lie one after the other on the thread's stack; those that find no room there come from the
// heap. Asking the heap for all of them takes as long as what a small set computes in them.
class Scratch final : public std::pmr::memory_resource {
  public:
    Scratch() {}  // leaves the room as it is

  private:
    static constexpr size_t ROOM = 48 << 10;
    alignas(64) std::byte room[ROOM];
    size_t used = 0;

    static size_t whole(size_t bytes) { return (bytes + 63) & ~size_t(63); }

    void* do_allocate(size_t bytes, size_t alignment) override {
        if (bytes > ROOM - used || whole(bytes) > ROOM - used)
            return ::operator new(bytes, std::align_val_t(alignment));
        void* const place = room + used;
        used += whole(bytes);
        return place;
    }

    void do_deallocate(void* place, size_t bytes, size_t alignment) override {
        std::byte* const at = static_cast<std::byte*>(place);
        if (at < room || at >= room + ROOM) return ::operator delete(place, std::align_val_t(alignment));
        if (at + whole(bytes) == room + used) used -= whole(bytes);  // the last one makes room; the others wait for it
    }

    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
};

// Values of a plain type that are not set yet.
template <class T>
class Unset {
  public:
    Unset(int64_t size, std::pmr::memory_resource* memory)
        : bytes(size * sizeof(T)), memory(memory), values(static_cast<T*>(memory->allocate(bytes, 64))) {}
    Unset(const Unset&) = delete;
    ~Unset() { memory->deallocate(values, bytes, 64); }
    operator T*() const { return values; }

  private:
    const size_t bytes;
    std::pmr::memory_resource* const memory;
    T* const values;
};

}  // namespace fcn_kernels
