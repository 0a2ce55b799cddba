"""CuPy arrays in and out: on the same memory, in the order of both libraries' streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statsmerge_ext import ops
from statsmerge_ext.ops.common import as_list, as_output, as_tensor, same_kind

pytestmark = pytest.mark.cupy


@pytest.fixture
def cupy():
    import cupy

    return cupy


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_arrays_share_their_memory_both_ways(cupy, dtype):
    array = cupy.arange(12, dtype=dtype).reshape(3, 4)
    for tensor in (as_tensor(array, "x"), as_output(array, "x")):
        assert tensor.is_cuda and tensor.data_ptr() == array.data.ptr and tensor.shape == (3, 4)
    back = same_kind(array)(tensor)
    assert isinstance(back, cupy.ndarray) and back.data.ptr == array.data.ptr and back.dtype == array.dtype
    assert [t.data_ptr() for t in as_list([array, array], "x")] == [array.data.ptr] * 2


def test_strided_arrays_share_their_memory(cupy):
    array = cupy.arange(40, dtype="float32").reshape(5, 8)[::2, 1::3]
    tensor = as_tensor(array, "x")
    assert tensor.data_ptr() == array.data.ptr and not tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.cpu().numpy(), cupy.asnumpy(array))


def test_weighted_merge(cupy):
    base = [cupy.random.rand(4, 5).astype("float32"), cupy.random.rand(7).astype("float64")]
    tau = [cupy.random.rand(4, 5).astype("float32"), cupy.random.rand(7).astype("float64")]
    merged = ops.weighted_merge(base, [tau, tau], cupy.asarray([0.5, 0.25]))
    for ours, b, t in zip(merged, base, tau):
        assert isinstance(ours, cupy.ndarray) and ours.dtype == b.dtype
        np.testing.assert_allclose(cupy.asnumpy(ours), cupy.asnumpy(b + 0.75 * t), rtol=1e-6)


def test_layer_solve(cupy):
    x = cupy.random.rand(200, 90)
    c = x.T @ x
    t = cupy.random.rand(3, 90)
    solution = ops.layer_solve(c, t @ c)
    assert isinstance(solution.T, cupy.ndarray) and isinstance(solution.rank, cupy.ndarray)
    np.testing.assert_allclose(cupy.asnumpy(solution.T), cupy.asnumpy(t), rtol=1e-6, atol=1e-8)
    thin = ops.layer_solve_features([x[:20]], [t])
    assert isinstance(thin.T, cupy.ndarray) and int(thin.rank) == 20


def test_gram_is_updated_in_place(cupy):
    x, gram = cupy.random.rand(50, 9).astype("float32"), cupy.zeros((9, 9), dtype="float32")
    assert ops.symmetrize_(ops.gram_accumulate_(gram, x)) is gram
    np.testing.assert_allclose(cupy.asnumpy(gram), cupy.asnumpy(x.T @ x), rtol=1e-5)


def test_topk_svd(cupy):
    matrices = [cupy.random.rand(30, 20).astype("float32") for _ in range(3)]
    result = ops.topk_svd(matrices, 2)
    assert isinstance(result.S, cupy.ndarray) or all(isinstance(s, cupy.ndarray) for s in result.S)
    exact = [np.linalg.svd(cupy.asnumpy(m), compute_uv=False)[:2] for m in matrices]
    for ours, theirs in zip(result.S, exact):
        np.testing.assert_allclose(cupy.asnumpy(ours), theirs, rtol=1e-2)


def test_streams_are_ordered(cupy):
    """The operator sees what CuPy's stream wrote, and CuPy's stream sees what the operator wrote."""
    numel = 4_000_000
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }', "spin"
    )
    for _ in range(5):
        with cupy.cuda.Stream(non_blocking=True) as stream, torch.cuda.stream(torch.cuda.Stream()):
            base = cupy.zeros(numel, dtype="float32")
            spin((1,), (1,), (np.int64(20_000_000),))
            base += 1
            merged = ops.weighted_merge([base], [[base]], [2.0])[0]
            total = merged.sum()
        stream.synchronize()
        assert float(total) == 3 * numel


def test_arrays_updated_in_place_are_ordered(cupy):
    """CuPy's stream waits for the update, though nothing new is handed to it; torch's is kept busy before."""
    for _ in range(5):
        with cupy.cuda.Stream(non_blocking=True) as stream, torch.cuda.stream(torch.cuda.Stream()):
            x, image = cupy.ones((400, 80), dtype="float32"), cupy.ones((1, 5, 20, 20), dtype="float32")
            gram, of_patches = cupy.zeros((80, 80), dtype="float32"), cupy.zeros((5, 4, 4), dtype="float32")
            torch.cuda._sleep(20_000_000)
            ops.gram_accumulate_(gram, x)
            first = gram.copy()
            torch.cuda._sleep(20_000_000)
            ops.symmetrize_(gram)
            second = gram.copy()
            torch.cuda._sleep(20_000_000)
            ops.gram_accumulate_patches_(of_patches, image, 2, groups=5)
            third = of_patches.copy()
        stream.synchronize()
        lower = np.tril(np.ones((80, 80), dtype=bool))
        assert (cupy.asnumpy(first)[lower] == 400).all() and (cupy.asnumpy(second) == 400).all()
        assert (cupy.asnumpy(third)[:, np.tri(4, dtype=bool)] == 361).all()
