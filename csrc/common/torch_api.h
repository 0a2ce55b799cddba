// What the kernels use of torch: names from the stable ABI, checks with readable messages, and calls of aten operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"

namespace statsmerge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// Throws with the message alone (STD_TORCH_CHECK would put this file's path in front of it); a ValueError in Python.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }
}

// "name[index]", as the messages call one of several matrices.
inline std::string indexed(std::string name, int64_t index) {
  return name.append("[").append(std::to_string(index)).append("]");
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}

inline Tensor slice(Tensor x, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(x, dim, start, length);
}

inline Tensor reshape(const Tensor& x, std::initializer_list<int64_t> size) {
  return torch::stable::reshape(x, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()));
}

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// Calls aten::name.overload with `args` and returns its first `Outputs` outputs. What aten says of an error is lost at
// a stable target of 2.11, so callers check their inputs first and use the *_ex forms of the factorisations.
template <size_t Outputs, class... Args>
std::array<Tensor, Outputs> call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > Outputs ? sizeof...(Args) : Outputs)> stack{
      torch::stable::detail::from(args)...};
  const auto error = torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION);
  if (error != TORCH_SUCCESS) throw std::runtime_error(std::string(name) + " failed");
  std::array<Tensor, Outputs> outputs;
  for (size_t i = 0; i < Outputs; ++i) outputs[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return outputs;
}

namespace aten {

inline Tensor matmul(const Tensor& a, const Tensor& b) { return torch::stable::matmul(a, b); }

inline Tensor transpose(const Tensor& a) { return torch::stable::transpose(a, -2, -1); }

}  // namespace aten
}  // namespace statsmerge
