// Memory that starts on a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace plait {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes);
    // For weights, which stay and are read from end to end again and again: taken from large pages where the
    // system has them, because looking up small ones costs a third of the memory's speed.
    static Buffer lasting(size_t bytes);

    uint8_t* data() const { return data_.get(); }
    size_t size() const { return size_; }

private:
    std::shared_ptr<uint8_t[]> data_;
    size_t size_ = 0;
};

}  // namespace plait
