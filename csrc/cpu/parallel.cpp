#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace statsmerge {

// torch's pool loses what an exception says, so exceptions are carried past it.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  std::mutex mutex;
  std::exception_ptr error;
  int64_t error_begin = end;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (first < error_begin) {
        error_begin = first;
        error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace statsmerge
