#include "buffer.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace plait {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kLargePage = size_t(2) << 20;
constexpr size_t kSlab = size_t(32) << 20;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

std::shared_ptr<uint8_t[]> allocate(size_t bytes, size_t alignment) {
    void* memory = std::aligned_alloc(alignment, round_up(bytes, alignment));
    if (memory == nullptr) throw std::bad_alloc();
    return {static_cast<uint8_t*>(memory), [](uint8_t* p) { std::free(p); }};
}

// The slab that is being filled. It is freed when the last buffer in it is.
struct Slab {
    std::mutex mutex;
    std::weak_ptr<uint8_t[]> memory;
    size_t used = 0;
};

}  // namespace

Buffer::Buffer(size_t bytes) : data_(allocate(bytes + kLine, kLine)), size_(bytes) {}

Buffer Buffer::lasting(size_t bytes) {
    static Slab slab;
    const size_t wanted = round_up(bytes + kLine, kLine);
    std::lock_guard<std::mutex> lock(slab.mutex);
    std::shared_ptr<uint8_t[]> memory = slab.memory.lock();
    if (!memory || slab.used + wanted > kSlab) {
        const size_t size = std::max(kSlab, round_up(wanted, kLargePage));
        memory = allocate(size, kLargePage);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        // Where it is refused, small pages are slower and nothing else.
        (void)madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
        slab.memory = memory;
        slab.used = 0;
    }
    Buffer buffer;
    buffer.data_ = std::shared_ptr<uint8_t[]>(memory, memory.get() + slab.used);
    buffer.size_ = bytes;
    slab.used += wanted;
    return buffer;
}

}  // namespace plait
