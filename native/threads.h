// One pool of threads for the whole process.
//
// `run` gives the same function to every thread of the team; inside, `Team::barrier` waits for all and
// `Team::take` hands out pieces of a loop. Which thread takes a piece never changes a result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace plait {

// A number that goes up, and threads that wait for it: they spin first, then sleep.
class Signal {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }
    void open();
    // Return when the value is no longer `seen`.
    void wait(uint32_t seen, int spins);

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

class Pool;

// What a thread sees of the team it runs in.
class Team {
public:
    int index;
    int size;

    void barrier();
    // This thread's part of [0, count), the same in every call: its memory is read in one run. No barrier.
    struct Range {
        int64_t begin, end;
    };
    Range part(int64_t count) const { return {count * index / size, count * (index + 1) / size}; }
    // Call `body(begin, end)` on pieces of [0, count) of at most `grain`, shared among the team; then wait for
    // all. Every thread must come here.
    template <class Body>
    void share(int64_t count, int64_t grain, Body body) {
        if (size == 1) {
            if (count > 0) body(int64_t(0), count);
            return;
        }
        const int slot = loop_++ & 1;
        for (;;) {
            const int64_t begin = take(slot, grain);
            if (begin >= count) break;
            body(begin, begin + grain < count ? begin + grain : count);
        }
        barrier();
        // The slot's next use lies behind one more barrier, so that nobody still takes from it.
        if (index == 0) reset(slot);
    }

private:
    friend class Pool;
    Team(Pool& pool, int index, int size) : index(index), size(size), pool_(pool) {}
    int64_t take(int slot, int64_t grain);
    void reset(int slot);

    Pool& pool_;
    int loop_ = 0;
};

class Pool {
public:
    // The pool of this process; made at first use, and again after a fork.
    static Pool& get();

    int size() const { return size_; }
    // Change the number of threads; waits until the pool is idle.
    void resize(int size);
    // Whether what the calling thread runs from now on runs on this thread alone, beside the pool and without
    // waiting for it: two such threads compute at the same time, each on its own core.
    static void set_alone(bool alone);
    static bool is_alone();
    // Run `body(team)` on every thread, the caller among them. One team runs at a time. `body` must not throw:
    // check and allocate before. The floating-point environment is the default one throughout.
    //
    // `work` estimates the multiply-adds: below what waking a thread costs, the caller runs alone.
    void run(const std::function<void(Team&)>& body, double work = 1e30);

    ~Pool();

private:
    friend class Team;
    explicit Pool(int size);
    void start(int size);
    void stop();
    void work(int index, uint32_t seen);
    void run_one(int index);

    int size_ = 0;
    std::vector<std::thread> threads_;
    std::mutex running_;
    Signal begin_;
    Signal barrier_;
    std::atomic<int> arrived_{0};
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int64_t> next_[2] = {{0}, {0}};
    const std::function<void(Team&)>* body_ = nullptr;
};

}  // namespace plait
