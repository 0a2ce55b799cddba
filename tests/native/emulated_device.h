// Runs CUDA kernels on the host, to be included before their .cuh files: one block after another, a fiber for every thread
// of the block. A fiber runs until it waits at a barrier, a shuffle or a ballot; nothing else orders the threads, and the
// thread sanitizer is told so: it sees a missing barrier, as the address sanitizer sees what lies out of bounds.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__ static
#define __device__ static
#define __launch_bounds__(...)
// One block runs at a time. Kernels are static functions, so their shared variables can be put side by side, and are
// filled with NaN before every block.
#define __shared__ static __attribute__((section("emulated_shared")))

extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));

struct Index {
  unsigned x = 0, y = 0;
};
struct double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
using std::isfinite;

inline Index threadIdx, blockIdx;

namespace emulated {

constexpr size_t kStack = 128 << 10;

struct Fiber {
  std::vector<char> stack = std::vector<char>(kStack);
  ucontext_t context{};
  void* sanitizer = nullptr;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline void* scheduler_sanitizer = nullptr;
inline const std::function<void()>* kernel_call = nullptr;

inline void switch_sanitizer([[maybe_unused]] void* fiber) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

inline void yield() {
  Fiber& self = fibers[threadIdx.x];
  switch_sanitizer(scheduler_sanitizer);
  swapcontext(&self.context, &scheduler);
}

class Barrier {
 public:
  explicit Barrier(int size = 0) : size_(size) {}
  void wait() {
    const int64_t now = passed_;
#ifdef __SANITIZE_THREAD__
    __tsan_release(this);
#endif
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++passed_;
    }
    while (passed_ == now) yield();
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(this);
#endif
  }

 private:
  int size_, arrived_ = 0;
  int64_t passed_ = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32] = {};
};

inline Barrier block;
inline std::vector<Warp> warps;

// Every lane's value, as lane `from` gave it.
template <class T>
T exchange(T value, const std::function<T(const uint64_t*)>& read) {
  Warp& warp = warps[threadIdx.x / 32];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  warp.slots[threadIdx.x % 32] = bits;
  warp.barrier.wait();
  const T result = read(warp.slots);
  warp.barrier.wait();
  return result;
}

inline void run_fiber() {
  (*kernel_call)();
  fibers[threadIdx.x].done = true;
  yield();
}

inline void run_block(int threads) {
  block = Barrier(threads);
  warps.assign(static_cast<size_t>((threads + 31) / 32), Warp());
  for (int thread = 0; thread < threads; ++thread) {
    warps[static_cast<size_t>(thread / 32)].barrier = Barrier(std::min(32, threads - thread / 32 * 32));
  }
  std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  fibers.resize(std::max(fibers.size(), static_cast<size_t>(threads)));
#ifdef __SANITIZE_THREAD__
  scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[static_cast<size_t>(thread)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.done = false;
#ifdef __SANITIZE_THREAD__
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
  for (int running = threads; running > 0;) {
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[static_cast<size_t>(thread)];
      if (fiber.done) continue;
      threadIdx.x = static_cast<unsigned>(thread);
      switch_sanitizer(fiber.sanitizer);
      swapcontext(&scheduler, &fiber.context);
      running -= fiber.done;
    }
  }
#ifdef __SANITIZE_THREAD__
  for (int thread = 0; thread < threads; ++thread) {
    __tsan_destroy_fiber(fibers[static_cast<size_t>(thread)].sanitizer);
  }
#endif
}

// kernel<<<grid, threads>>>(...) with the call in `kernel`.
inline void launch(Index grid, int threads, const std::function<void()>& kernel) {
  kernel_call = &kernel;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::block.wait(); }
inline void __syncwarp() { emulated::warps[threadIdx.x / 32].barrier.wait(); }

inline double __shfl_xor_sync(unsigned, double value, int distance) {
  const unsigned from = (threadIdx.x % 32) ^ static_cast<unsigned>(distance);
  return emulated::exchange<double>(value, [from](const uint64_t* slots) {
    double other;
    std::memcpy(&other, slots + from, sizeof(double));
    return other;
  });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulated::exchange<unsigned>(value, [](const uint64_t* slots) {
    unsigned seen = 0;
    for (int lane = 0; lane < 32; ++lane) seen |= static_cast<unsigned>(slots[lane] & 1) << lane;
    return seen;
  });
}
