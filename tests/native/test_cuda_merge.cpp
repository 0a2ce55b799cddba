// The merge kernels on the host: every element is merged once, whatever its type, its tensor's size and its place in
// memory. Mostly by loops over the threads' functions; a few launches run the kernels themselves.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "emulated_device.h"
// after what stands for the device
#include "cuda/weighted_merge.cuh"

namespace {

using namespace statsmerge;
using namespace statsmerge::cuda;

constexpr Storage kStorages[] = {Storage::f64, Storage::f32, Storage::bf16, Storage::f16};

// Values as one tensor of the given type, `shift` bytes off the alignment of a pack.
struct Stored {
  Stored(const std::vector<double>& values, Storage storage, int64_t shift = 0)
      : memory(values.size() * 8 + 64 + shift), storage(storage) {
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (16 - at % 16) % 16 + shift;
    for (size_t i = 0; i < values.size(); ++i) set_element<double>(data, storage, static_cast<int64_t>(i), values[i]);
  }
  double operator[](int64_t i) const { return element<double>(data, storage, i); }

  std::vector<char> memory;
  char* data;
  Storage storage;
};

// Random codes of a quantised task vector.
struct Quantized {
  Quantized(int64_t numel, int bits, int64_t group_size, uint64_t seed)
      : codes((numel + 7) / 8 * bits + 16), scale((numel + group_size - 1) / group_size + 1), zero(scale.size()) {
    std::mt19937_64 random(seed);
    for (char& c : codes) c = static_cast<char>(random());
    for (size_t g = 0; g < scale.size(); ++g) {
      scale[g] = 0.01f * static_cast<float>(1 + random() % 100);
      zero[g] = static_cast<int32_t>(random() % 300) - 100;
    }
    const auto at = reinterpret_cast<uintptr_t>(codes.data());
    view = {codes.data() + (8 - at % 8) % 8, Storage::f32, bits, scale.data(), zero.data(), group_size};
  }

  std::vector<char> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero;
  TaskVector view;
};

double code_value(const TaskVector& t, int64_t i) {
  uint32_t code = 0;
  for (int b = 0; b < t.bits; ++b) {
    const int64_t bit = i * t.bits + b;
    code |= static_cast<uint32_t>(t.data[bit / 8] >> (bit % 8) & 1) << b;
  }
  return t.scale[i / t.group_size] * (static_cast<float>(code) - static_cast<float>(t.zero_point[i / t.group_size]));
}

// The tables of a launch, as the operator makes them.
struct Launch {
  void add(const Stored& base, Stored* out, int64_t numel, bool packs, const std::vector<TaskVector>& tasks) {
    bool wide = base.storage == Storage::f64;
    for (const TaskVector& t : tasks) wide = wide || (t.bits == 0 && t.storage == Storage::f64);
    layers.push_back({base.data, out ? out->data : nullptr, numel, packs ? numel / kPack * kPack : 0, base.storage, wide});
    of_layer.push_back(tasks);
  }
  MergeArguments arguments(int64_t chunk) {
    const size_t count = of_layer[0].size();
    start = {0};
    for (const Layer& layer : layers) start.push_back(start.back() + (layer.numel + chunk - 1) / chunk);
    tasks.clear();
    for (size_t k = 0; k < count; ++k) {
      for (const auto& row : of_layer) tasks.push_back(row[k]);
    }
    return {layers.data(), tasks.data(), start.data(), coefficients.data(), static_cast<int64_t>(layers.size()),
            static_cast<int64_t>(count), chunk};
  }

  std::vector<Layer> layers;
  std::vector<std::vector<TaskVector>> of_layer;
  std::vector<TaskVector> tasks;
  std::vector<int64_t> start;
  std::vector<double> coefficients;
};

int64_t find_layer(const MergeArguments& a, int64_t chunk) {
  Search search{0, a.layer_count};
  while (search.count > 1) {
    uint32_t seen = 0;
    for (int lane = 0; lane < 32; ++lane) seen |= static_cast<uint32_t>(search.below(a.chunk_start, chunk, lane)) << lane;
    search.narrow(seen);
  }
  return search.low;
}

void run_merge(const MergeArguments& a) {
  for (int64_t block = 0; block < a.chunk_start[a.layer_count]; ++block) {
    const int64_t l = find_layer(a, block);
    for (int thread = 0; thread < kThreads; ++thread) {
      if (a.layers[l].wide) {
        merge_thread<double>(a, l, chunk_range(a, l, block), thread);
      } else {
        merge_thread<float>(a, l, chunk_range(a, l, block), thread);
      }
    }
  }
}

std::vector<double> run_dot(const MergeArguments& a) {
  std::vector<double> out(static_cast<size_t>(a.layer_count * a.tasks), 0.0);
  for (int64_t block = 0; block < a.chunk_start[a.layer_count]; ++block) {
    const int64_t l = find_layer(a, block);
    for (int64_t first = 0; first < a.tasks; first += kTasksAtOnce) {
      const int count = static_cast<int>(std::min<int64_t>(kTasksAtOnce, a.tasks - first));
      std::vector<double> sums(static_cast<size_t>(kTasksAtOnce * kThreads), 0.0);
      for (int thread = 0; thread < kThreads; ++thread) {
        if (a.layers[l].wide) {
          dot_thread<double>(a, l, chunk_range(a, l, block), first, count, thread, sums.data() + thread);
        } else {
          dot_thread<float>(a, l, chunk_range(a, l, block), first, count, thread, sums.data() + thread);
        }
      }
      for (int j = 0; j < count; ++j) {
        for (int thread = 0; thread < kThreads; ++thread) out[l * a.tasks + first + j] += sums[j * kThreads + thread];
      }
    }
  }
  return out;
}

double epsilon(Storage storage) {
  return storage == Storage::f64 ? 1e-15 : storage == Storage::f32 ? 1e-6 : storage == Storage::bf16 ? 4e-3 : 5e-4;
}

}  // namespace

DEVICE_TEST(cuda_merge_covers_every_element_of_every_type) {
  for (const int64_t numel : {1, 7, 8, 9, 4096, 5003}) {
    for (const Storage base_type : kStorages) {
      for (const Storage task_type : kStorages) {
        for (const bool packs : {true, false}) {
          const int64_t shift = packs ? 0 : bytes_of(base_type);
          const Stored base(normal(numel, 1), base_type, shift), t0(normal(numel, 2), task_type),
              t1(normal(numel, 3), Storage::f32);
          Stored out(std::vector<double>(static_cast<size_t>(numel), 77.0), base_type, shift);
          const Quantized q(numel, 4, 16, 5);
          Launch launch;
          launch.coefficients = {0.5, -2.0, 0.25};
          launch.add(base, &out, numel, packs,
                     {{t0.data, task_type, 0, nullptr, nullptr, 1}, {t1.data, Storage::f32, 0, nullptr, nullptr, 1}, q.view});
          run_merge(launch.arguments(kTile));
          for (int64_t i = 0; i < numel; ++i) {
            const double exact = base[i] + 0.5 * t0[i] - 2.0 * t1[i] + 0.25 * code_value(q.view, i);
            CHECK(std::abs(out[i] - exact) <= epsilon(base_type) * (4 + std::abs(exact) + std::abs(t1[i])), numel, i, out[i], exact);
          }
          const auto before = [&](int64_t from, int64_t to) {
            return std::all_of(out.data + from, out.data + to, [](char c) { return c == 0; });
          };
          CHECK(before(numel * bytes_of(base_type), numel * bytes_of(base_type) + 16), numel);
        }
      }
    }
  }
}

DEVICE_TEST(cuda_merge_reads_codes_of_every_width_and_group) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const int64_t group : {8, 24, 64, 1000, 4104, 100000}) {
      const int64_t numel = 9001;
      const Quantized q(numel, bits, group, 7);
      const Stored base(std::vector<double>(numel, 0.0), Storage::f32);
      Stored out(std::vector<double>(numel, 9.0), Storage::f32), wide(std::vector<double>(numel, 9.0), Storage::f64);
      const Stored base64(std::vector<double>(numel, 0.0), Storage::f64);
      Launch launch;
      launch.coefficients = {1.0, 1.0};
      launch.add(base, &out, numel, true, {q.view});
      launch.add(base64, &wide, numel, true, {q.view});
      run_merge(launch.arguments(2 * kTile));
      for (int64_t i = 0; i < numel; ++i) {
        CHECK(out[i] == code_value(q.view, i), bits, group, i);  // restored exactly
        CHECK(wide[i] == code_value(q.view, i), bits, group, i);
      }
    }
  }
}

DEVICE_TEST(cuda_merge_gradient_sums_every_element_once) {
  const std::vector<int64_t> sizes = {3, 0, 4096, 20011, 8};
  for (const Storage type : kStorages) {
    for (const bool packs : {true, false}) {
      const int64_t tasks = 11;
      std::vector<Stored> gradients, taus;
      std::vector<Quantized> codes;
      gradients.reserve(sizes.size());
      taus.reserve(sizes.size() * tasks);
      codes.reserve(sizes.size());
      Launch launch;
      std::vector<double> exact, magnitude;
      for (const int64_t numel : sizes) {
        gradients.emplace_back(normal(numel, 10 + numel), type);
        codes.emplace_back(numel + 1, 3, 32, numel);
        std::vector<TaskVector> row;
        for (int64_t k = 0; k + 1 < tasks; ++k) {
          taus.emplace_back(normal(numel, 100 * k + numel), kStorages[(k + 1) % (type == Storage::f64 ? 4 : 3) + (type != Storage::f64)]);
          row.push_back({taus.back().data, taus.back().storage, 0, nullptr, nullptr, 1});
        }
        row.push_back(codes.back().view);
        for (const TaskVector& t : row) {
          double sum = 0, total = 0;
          for (int64_t i = 0; i < numel; ++i) {
            const double product = gradients.back()[i] * (t.bits ? code_value(t, i) : element<double>(t.data, t.storage, i));
            sum += product;
            total += std::abs(product);
          }
          exact.push_back(sum);
          magnitude.push_back(total);
        }
        launch.add(gradients.back(), nullptr, numel, packs, row);
      }
      const auto sums = run_dot(launch.arguments(kTile));
      for (size_t i = 0; i < sums.size(); ++i) {
        CHECK(std::abs(sums[i] - exact[i]) <= (type == Storage::f64 ? 1e-14 : 3e-7) * magnitude[i], i, sums[i], exact[i]);
      }
    }
  }
}

DEVICE_TEST(cuda_search_finds_the_tensor_of_every_chunk) {
  std::mt19937_64 random(3);
  for (const int64_t layers : {1, 2, 31, 32, 33, 64, 200, 1025, 3000}) {
    std::vector<int64_t> start = {0}, owner;
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t chunks = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 4);
      for (int64_t c = 0; c < chunks; ++c) owner.push_back(l);
      start.push_back(start.back() + chunks);
    }
    MergeArguments a{};
    a.chunk_start = start.data();
    a.layer_count = layers;
    for (size_t chunk = 0; chunk < owner.size(); ++chunk) {
      CHECK(find_layer(a, static_cast<int64_t>(chunk)) == owner[chunk], layers, chunk);
    }
  }
}

DEVICE_TEST(cuda_chunks_are_whole_tiles) {
  for (const int64_t numel : {int64_t{0}, int64_t{1000}, int64_t{90000000}, int64_t{8000000000}, int64_t{1} << 40}) {
    CHECK(chunk_size(numel) % kTile == 0 && chunk_size(numel) >= kTile && chunk_size(numel) <= 16 * kTile);
    CHECK(numel / chunk_size(numel) < 0x7fffffff);
  }
}

DEVICE_TEST(cuda_merge_kernels_agree_with_their_threads) {
  const std::vector<int64_t> sizes = {3, 0, 4096, 9001, 0};
  const int64_t tasks = 9;
  std::vector<Stored> base, out, expected, taus;
  for (auto* stored : {&base, &out, &expected}) stored->reserve(sizes.size());
  taus.reserve(sizes.size() * tasks);
  Launch launch, reference;
  for (const int64_t numel : sizes) {
    base.emplace_back(normal(numel, numel), Storage::bf16);
    out.emplace_back(std::vector<double>(numel, 5.0), Storage::bf16);
    expected.emplace_back(std::vector<double>(numel, 6.0), Storage::bf16);
    std::vector<TaskVector> row;
    for (int64_t k = 0; k < tasks; ++k) {
      taus.emplace_back(normal(numel, 7 * numel + k), k % 2 ? Storage::f32 : Storage::bf16);
      row.push_back({taus.back().data, taus.back().storage, 0, nullptr, nullptr, 1});
      launch.coefficients.push_back(0.1 * static_cast<double>(k));
    }
    launch.add(base.back(), &out.back(), numel, true, row);
    reference.add(base.back(), &expected.back(), numel, true, row);
  }
  reference.coefficients = launch.coefficients;
  const MergeArguments a = launch.arguments(kTile);
  run_merge(reference.arguments(kTile));
  const unsigned chunks = static_cast<unsigned>(a.chunk_start[a.layer_count]);
  emulated::launch({chunks, 1}, kThreads, [&] { merge_kernel(a); });
  for (size_t l = 0; l < sizes.size(); ++l) {
    for (int64_t i = 0; i < sizes[l]; ++i) CHECK(out[l][i] == expected[l][i], l, i);
  }
  std::vector<double> partial(static_cast<size_t>(chunks * tasks), NAN), sums(static_cast<size_t>(a.layer_count * tasks), NAN);
  emulated::launch({chunks, 2}, kThreads, [&] { chunk_dot_kernel(a, partial.data()); });
  const unsigned blocks = static_cast<unsigned>((sums.size() * 32 + kThreads - 1) / kThreads);
  emulated::launch({blocks, 1}, kThreads, [&] { sum_chunks_kernel(a, partial.data(), sums.data()); });
  const auto exact = run_dot(a);
  for (size_t i = 0; i < sums.size(); ++i) CHECK(std::abs(sums[i] - exact[i]) <= 1e-12 * (1 + std::abs(exact[i])), i);
}
