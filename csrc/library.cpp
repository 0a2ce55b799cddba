// The operators' schemas, and nothing else: the table of contents of the native code. Each is implemented in the file
// of its name under cpu/ and cuda/; its public wrapper, reference and fake kernel are in statsmerge_ext/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(statsmerge, m) {
  m.def(
      "topk_svd(Tensor[] mats, Tensor[] minus, int k, float tol, int max_passes, bool vectors, int seed)"
      " -> (Tensor[] s, Tensor[] u, Tensor[] vh, Tensor[] residual, Tensor passes)");
  m.def("weight_statistics(Tensor[] mats, Tensor[] minus, int r, float tol, int max_passes, int seed) -> Tensor");
  m.def("gram_accumulate_(Tensor(a!) gram, Tensor x, Tensor? weight, Tensor? other) -> ()");
  m.def(
      "gram_accumulate_patches_(Tensor(a!) gram, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
      " int groups, Tensor? weight, Tensor? other) -> ()");
  m.def("symmetrize_(Tensor(a!) gram) -> ()");
  m.def(
      "layer_solve(Tensor c, Tensor d, Tensor? anchor, float rcond, float ridge)"
      " -> (Tensor t, Tensor rank, Tensor condition)");
  m.def(
      "layer_solve_features(Tensor[] xs, Tensor[] ts, Tensor[] weights, float rcond)"
      " -> (Tensor t, Tensor rank, Tensor condition)");
  m.def(
      "weighted_merge(Tensor[] base, Tensor[] task_vectors, Tensor[] scales, Tensor[] zero_points, int[] bits,"
      " int[] group_sizes, Tensor coefficients) -> Tensor[]");
  m.def(
      "weighted_merge_grad(Tensor[] grads, Tensor[] task_vectors, Tensor[] scales, Tensor[] zero_points, int[] bits,"
      " int[] group_sizes) -> Tensor");
}
