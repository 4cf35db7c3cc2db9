#include "threads.h"

#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace plait {
namespace {

// About 50 microseconds between two calls, and 20 inside one, before a thread sleeps.
constexpr int kIdleSpins = 2000;
constexpr int kBarrierSpins = 1000;
// Multiply-adds of about 20 microseconds of one thread.
constexpr double kAloneBelow = 200e3;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Rounding to nearest and subnormal numbers kept, whatever the caller set: results must not depend on it.
class PlainFloats {
public:
    PlainFloats() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~PlainFloats() { std::fesetenv(&saved_); }

private:
    std::fenv_t saved_;
};

// Physical cores that this process may use: threads of one core share its multipliers.
int physical_cores() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::string> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            char path[128], line[128] = "";
            std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            if (std::FILE* file = std::fopen(path, "r")) {
                if (std::fgets(line, sizeof line, file) == nullptr) line[0] = '\0';
                std::fclose(file);
            }
            cores.insert(line[0] ? std::string(line) : std::to_string(cpu));
        }
        if (!cores.empty()) return int(cores.size());
    }
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? int(count) : 1;
}

int default_size() {
    if (const char* text = std::getenv("PLAIT_THREADS")) {
        const int count = std::atoi(text);
        if (count >= 1 && count <= 1024) return count;
    }
    return physical_cores();
}

thread_local bool runs_alone = false;

Pool* process_pool = nullptr;
std::mutex process_pool_mutex;

}  // namespace

void Signal::open() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
}

void Signal::wait(uint32_t seen, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (value() != seen) return;
        pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    // Announced before the value is read again: `open` either sees the sleeper or has changed the value.
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Team::barrier() {
    if (size == 1) return;
    const uint32_t seen = pool_.barrier_.value();
    if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        pool_.arrived_.store(0, std::memory_order_relaxed);
        pool_.barrier_.open();
    } else {
        pool_.barrier_.wait(seen, kBarrierSpins);
    }
}

int64_t Team::take(int slot, int64_t grain) {
    return pool_.next_[slot].fetch_add(grain, std::memory_order_relaxed);
}

void Team::reset(int slot) { pool_.next_[slot].store(0, std::memory_order_relaxed); }

Pool& Pool::get() {
    std::lock_guard<std::mutex> lock(process_pool_mutex);
    if (process_pool == nullptr) {
        process_pool = new Pool(default_size());
#if defined(__unix__) || defined(__APPLE__)
        // A forked child has none of the threads: it makes a pool of its own, and leaves the old one be.
        static const int registered = pthread_atfork(
            [] { process_pool_mutex.lock(); }, [] { process_pool_mutex.unlock(); },
            [] {
                process_pool = nullptr;
                process_pool_mutex.unlock();
            });
        (void)registered;
#endif
    }
    return *process_pool;
}

Pool::Pool(int size) { start(size); }

Pool::~Pool() { stop(); }

void Pool::start(int size) {
    size_ = size;
    stopping_ = false;
    // Read here, while no team runs: a thread that read it itself might already miss a run.
    const uint32_t seen = begin_.value();
    for (int index = 1; index < size; ++index) threads_.emplace_back([this, index, seen] { work(index, seen); });
}

void Pool::stop() {
    stopping_ = true;
    begin_.open();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Pool::resize(int size) {
    std::lock_guard<std::mutex> lock(running_);
    if (size == size_) return;
    stop();
    start(size);
}

void Pool::work(int index, uint32_t seen) {
    for (;;) {
        begin_.wait(seen, kIdleSpins);
        ++seen;
        if (stopping_) return;
        run_one(index);
    }
}

void Pool::run_one(int index) {
    PlainFloats plain;
    Team team(*this, index, size_);
    (*body_)(team);
    team.barrier();
}

void Pool::set_alone(bool alone) { runs_alone = alone; }

bool Pool::is_alone() { return runs_alone; }

void Pool::run(const std::function<void(Team&)>& body, double work) {
    if (work < kAloneBelow || size_ == 1 || runs_alone) {
        PlainFloats plain;
        Team team(*this, 0, 1);
        body(team);
        return;
    }
    std::lock_guard<std::mutex> lock(running_);
    body_ = &body;
    next_[0].store(0, std::memory_order_relaxed);
    next_[1].store(0, std::memory_order_relaxed);
    if (size_ > 1) begin_.open();
    run_one(0);
    body_ = nullptr;
}

}  // namespace plait
