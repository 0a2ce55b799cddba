// A minimal test harness: no test here needs torch, so a sanitizer sees the kernels and nothing else.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct NativeTest {
  const char* name;
  void (*run)();
};

inline std::vector<NativeTest>& native_tests() {
  static std::vector<NativeTest> tests;
  return tests;
}

// NATIVE_TEST(name) { ... } is run once for every instruction set that the processor has.
#define NATIVE_TEST(name)                                                                        \
  static void name();                                                                            \
  static const bool registered_##name = (native_tests().push_back({#name, &name}), true);        \
  static void name()

// NATIVE_TEST for code of the device, which does not depend on the instruction set: run for the first one only.
#define DEVICE_TEST(name)                                                                        \
  static void name##_once();                                                                     \
  NATIVE_TEST(name) {                                                                            \
    static const bool done = (name##_once(), true);                                              \
    CHECK(done);                                                                                 \
  }                                                                                              \
  static void name##_once()

#define CHECK(condition, ...)                                                                          \
  do {                                                                                                 \
    if (!(condition)) fail(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__);                  \
  } while (false)

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const char* condition, const Parts&... parts) {
  std::ostringstream message;
  message << file << ":" << line << ": " << condition;
  ((message << "  " << parts), ...);
  throw std::runtime_error(message.str());
}

// Reproducible normal numbers.
inline std::vector<double> normal(int64_t count, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> distribution;
  std::vector<double> out(static_cast<size_t>(count));
  for (double& x : out) x = distribution(generator);
  return out;
}

template <class T>
std::vector<T> cast(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

// How many threads parallel_for uses; 1 to begin with.
void set_threads(int threads);
