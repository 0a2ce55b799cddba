// parallel_for on threads of its own, in the place of torch's pool: the thread sanitizer knows these.
#include <algorithm>
#include <exception>
#include <thread>

#include "check.h"
#include "common/parallel.h"

namespace {
int thread_count = 1;
thread_local bool inside = false;
}  // namespace

void set_threads(int threads) { thread_count = threads; }

namespace statsmerge {

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  if (begin >= end) return;
  const int64_t pieces = inside ? 1 : std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, thread_count);
  if (pieces == 1) return f(begin, end);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(pieces));
  std::vector<std::thread> threads;
  for (int64_t p = 0; p < pieces; ++p) {
    threads.emplace_back([&, p] {
      inside = true;
      try {
        f(begin + p * (end - begin) / pieces, begin + (p + 1) * (end - begin) / pieces);
      } catch (...) {
        errors[static_cast<size_t>(p)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace statsmerge
