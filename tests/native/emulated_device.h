// Runs CUDA kernels on the host, to be included before their .cuh files: one block after another, a fiber for every thread
// of the block. A fiber runs until it waits at a barrier, a shuffle or a ballot; nothing else orders the threads, and the
// thread sanitizer is told so: it sees a missing barrier, as the address sanitizer sees what lies out of bounds.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define EMULATOR_INTERNAL __attribute__((no_sanitize_thread, noinline))
#else
#define EMULATOR_INTERNAL
#endif

#define __global__ static
#define __device__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time. Kernels are static functions, so their shared variables can be put side by side, and are
// filled with NaN before every block; GCC leaves those of templates elsewhere, where they keep what the last block left.
#define __shared__ static __attribute__((section("emulated_shared")))

extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));

// A coordinate that the emulator sets and kernels read.
struct Coordinate {
  EMULATOR_INTERNAL operator unsigned() const { return value; }
  EMULATOR_INTERNAL void operator=(unsigned to) { value = to; }
  unsigned value = 0;
};
struct Index {
  unsigned x = 0, y = 0;
};
struct double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
using std::isfinite;

struct Coordinates {
  Coordinate x, y;
};
inline Coordinates threadIdx, blockIdx;

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

// What orders memory between threads: what comes before a release is seen after an acquire of the same place.
inline void release([[maybe_unused]] void* place) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(place);
#endif
}

inline void acquire([[maybe_unused]] void* place) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(place);
#endif
}

EMULATOR_INTERNAL inline void switch_to(void* sanitizer, ucontext_t* from, const ucontext_t* to) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(sanitizer, __tsan_switch_to_fiber_no_sync);
#else
  (void)sanitizer;
#endif
  swapcontext(from, to);
}

EMULATOR_INTERNAL inline void yield() { switch_to(scheduler_sanitizer, &fibers[threadIdx.x].context, &scheduler); }

class Barrier {
 public:
  explicit Barrier(int size = 0) : size_(size) {}
  void wait() {
    release(this);
    pass();
    acquire(this);
  }

 private:
  EMULATOR_INTERNAL void pass() {
    const int64_t now = passed_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++passed_;
    }
    while (passed_ == now) yield();
  }

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

EMULATOR_INTERNAL inline void finish() {
  fibers[threadIdx.x].done = true;
  yield();
}

inline void run_fiber() {
  acquire(&scheduler);
  (*kernel_call)();
  release(&scheduler);
  finish();
}

EMULATOR_INTERNAL inline void run_fibers(int threads) {
  for (int running = threads; running > 0;) {
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[static_cast<size_t>(thread)];
      if (fiber.done) continue;
      threadIdx.x = static_cast<unsigned>(thread);
      switch_to(fiber.sanitizer, &scheduler, &fiber.context);
      running -= fiber.done;
    }
  }
}

inline void run_block(int threads) {
  block = Barrier(threads);
  warps.assign(static_cast<size_t>((threads + 31) / 32), Warp());
  for (int thread = 0; thread < threads; ++thread) {
    warps[static_cast<size_t>(thread / 32)].barrier = Barrier(std::min(32, threads - thread / 32 * 32));
  }
  std::fill(__start_emulated_shared, __stop_emulated_shared, static_cast<char>(0xff));
  fibers.resize(std::max(fibers.size(), static_cast<size_t>(threads)));
  for (int thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[static_cast<size_t>(thread)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.done = false;
#ifdef __SANITIZE_THREAD__
    scheduler_sanitizer = __tsan_get_current_fiber();
    if (fiber.sanitizer == nullptr) fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
  release(&scheduler);
  run_fibers(threads);
  acquire(&scheduler);
}

// kernel<<<grid, threads>>>(...) with the call in `kernel`.
inline void launch(Index grid, int threads, const std::function<void()>& kernel) {
  kernel_call = &kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx.x = x;
      blockIdx.y = y;
      run_block(threads);
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::block.wait(); }
inline void __syncwarp() { emulated::warps[threadIdx.x / 32].barrier.wait(); }

inline int __popc(unsigned bits) { return std::popcount(bits); }

// Whether `value` holds for any thread of the block.
inline int __syncthreads_or(int value) {
  static std::atomic<int> any;
  if (threadIdx.x == 0) any = 0;
  emulated::block.wait();
  if (value) any = 1;
  emulated::block.wait();
  const int result = any;
  emulated::block.wait();
  return result;
}

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
