// The Python module `statsmerge_ext._C`. Importing it registers the operators (the other files of the same shared
// object do that when they are loaded); the module itself only tells how it was built and what the processor can do.

// pybind11's headers inside torch before 2.13 refuse to be included while a stable ABI version is targeted. Nothing of
// torch is used in this file, so it keeps the number under another name.
#ifdef TORCH_TARGET_VERSION
static constexpr unsigned long long kTorchTargetVersion = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION
#else
#error "TORCH_TARGET_VERSION must be set by the build"
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/simd/targets.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef USE_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["torch_target_version"] =
      std::to_string(kTorchTargetVersion >> 56) + "." + std::to_string((kTorchTargetVersion >> 48) & 0xff);
  info["compiler"] = __VERSION__;
  info["cpu_targets"] = statsmerge::supported_targets();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of statsmerge_ext; importing this module registers torch.ops.statsmerge.*";
  m.def("build_info", &build_info, "How this module was built and for which vector extensions of this processor.");
  m.def("cpu_target", &statsmerge::active_target_name, "The vector extensions that the CPU kernels use now.");
  m.def("set_cpu_target", &statsmerge::set_target, pybind11::arg("target"),
        "Have them use others of build_info()['cpu_targets']: for tests and benchmarks.");
}
