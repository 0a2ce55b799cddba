"""weighted_merge, its gradients, and quantised task vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statsmerge_ext import _C
from statsmerge_ext.ops import QuantizedTensor, prepare_task_vectors, weighted_merge
from statsmerge_ext.ops.weighted_merge import weighted_merge_reference

SHAPES = [(5,), (0,), (3, 4, 2), (100, 130), ()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = [2, 3, 4, 8]


def model(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def exact_merge(base: list[Tensor], tasks: list[list[Tensor]], coefficients: Tensor) -> list[Tensor]:
    return weighted_merge_reference(
        [b.double() for b in base], [[t.double() for t in task] for task in tasks], coefficients.double()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task_dtype", DTYPES)
@pytest.mark.parametrize("layer_wise", [False, True])
def test_matches_float64(dtype, task_dtype, layer_wise, assert_as_accurate):
    base, tasks = model(dtype), [model(task_dtype) for _ in range(3)]
    coefficients = torch.randn(*([len(base)] if layer_wise else []), 3)
    merged = weighted_merge(base, tasks, coefficients)
    exact, peer = exact_merge(base, tasks, coefficients), weighted_merge_reference(base, tasks, coefficients)
    for ours, theirs, true, tensor in zip(merged, peer, exact, base):
        assert ours.dtype == dtype and ours.shape == tensor.shape
        assert_as_accurate(ours, theirs, true, floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_task_vectors_return_the_base(dtype):
    base = model(dtype)
    zeros = [[torch.zeros_like(b) for b in base]] * 2
    for merged in (weighted_merge(base, zeros, [0.7, -3.0]), weighted_merge(base, [model(), model()], [0.0, 0.0])):
        assert all(torch.equal(m, b) and m.data_ptr() != b.data_ptr() for m, b in zip(merged, base) if b.numel())


def test_rounding_of_half_types_is_torchs():
    values = torch.cat(
        [torch.randn(5000), torch.randn(5000) * 1e-7, torch.tensor([65519.0, 65520.0, 1e30, torch.inf, -torch.inf])]
    )
    for dtype in (torch.bfloat16, torch.float16):
        base = torch.zeros(len(values), dtype=dtype)
        assert torch.equal(weighted_merge([base], [[values]], [1.0])[0], values.to(dtype))
        nan = weighted_merge([base[:1]], [[torch.tensor([torch.nan])]], [1.0])[0]
        assert nan.isnan().all()


def test_every_half_value_is_read_exactly():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        tau = bits.view(dtype)
        merged = weighted_merge([torch.zeros(len(bits))], [[tau]], [1.0])[0]
        torch.testing.assert_close(merged, tau.float(), rtol=0, atol=0, equal_nan=True)


def test_no_tasks_and_no_tensors():
    base = model()
    for coefficients in (torch.zeros(0), torch.zeros(len(base), 0, requires_grad=True)):
        assert all(torch.equal(m, b) for m, b in zip(weighted_merge(base, [], coefficients), base))
    assert weighted_merge([], [[], []], torch.ones(2)) == []


def test_strides(assert_as_accurate):
    base, tau = torch.randn(60, 40).T, torch.randn(80, 120)[::2, ::2]
    merged = weighted_merge([base], [[tau]], [0.5])[0]
    assert merged.is_contiguous()
    torch.testing.assert_close(merged, base + 0.5 * tau)


@pytest.mark.parametrize("layer_wise", [False, True])
def test_gradcheck(layer_wise):
    base = [b.double().requires_grad_() for b in model(shapes=[(3,), (2, 4)])]
    tasks = [[t.double().requires_grad_() for t in model(shapes=[(3,), (2, 4)])] for _ in range(2)]
    coefficients = torch.randn(*([2] if layer_wise else []), 2, dtype=torch.float64, requires_grad=True)

    def f(coefficients: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(weighted_merge(flat[:2], [flat[2:4], flat[4:]], coefficients))

    assert torch.autograd.gradcheck(f, (coefficients, *base, *tasks[0], *tasks[1]))


@pytest.mark.parametrize("task_dtype", DTYPES)
def test_gradient_of_coefficients_matches_float64(task_dtype, assert_as_accurate):
    shapes = [(30_000,), (7,), (64, 65)]
    base, tasks = model(shapes=shapes), [model(task_dtype, shapes) for _ in range(3)]
    upstream = model(shapes=shapes)
    gradients = []
    for function, double in ((weighted_merge, False), (weighted_merge_reference, False), (exact_merge, True)):
        coefficients = torch.full((3, 3), 0.3, dtype=torch.float64 if double else torch.float32, requires_grad=True)
        merged = function(base, tasks, coefficients)
        torch.autograd.backward(merged, [g.to(m.dtype) for g, m in zip(upstream, merged)])
        gradients.append(coefficients.grad)
    assert_as_accurate(*gradients)


@pytest.mark.parametrize("bits", [None, 4])
def test_prepared_task_vectors_give_the_same(bits):
    base, tasks = model(), [model(), [t.requires_grad_(bits is None) for t in model()], model(torch.bfloat16)]
    if bits:
        tasks[0] = [QuantizedTensor.quantize(t, bits) for t in tasks[0]]
    prepared = prepare_task_vectors(tasks, base)
    assert prepare_task_vectors(prepared, base) is prepared
    coefficients = torch.randn(len(base), 3).requires_grad_()
    leaves, results = [coefficients, *(tasks[1] if bits is None else ())], []
    for task_vectors in (tasks, prepared, prepared):
        merged = weighted_merge(base, task_vectors, coefficients)
        results.append((*merged, *torch.autograd.grad(sum(m.square().sum() for m in merged), leaves)))
    assert all(torch.equal(x, y) for others in results[1:] for x, y in zip(results[0], others))
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(results[0], weighted_merge(base, prepared, coefficients)))


def test_prepared_task_vectors_fit_their_base_alone():
    prepared = prepare_task_vectors([model()], model())
    with pytest.raises(ValueError, match="task_vectors: expected task vectors prepared for tensors of the base's"):
        weighted_merge(model(shapes=SHAPES[1:]), prepared, [1.0])
    with pytest.raises(ValueError, match=r"coefficients: expected shape \[1\], got \[2\]"):
        weighted_merge(model(), prepared, [1.0, 2.0])


def test_task_vectors_changed_before_the_backward_pass_are_noticed():
    base, tasks = model(), [model()]
    coefficients = torch.ones(1, requires_grad=True)
    merged = weighted_merge(base, prepare_task_vectors(tasks, base), coefficients)
    tasks[0][0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(m.sum() for m in merged).backward()


def test_unused_outputs_have_zero_gradient():
    coefficients = torch.zeros(2, 1, requires_grad=True)
    first, _ = weighted_merge([torch.ones(3), torch.ones(4)], [[torch.ones(3), torch.ones(4)]], coefficients)
    first.sum().backward()
    assert coefficients.grad.tolist() == [[3], [0]]


@pytest.mark.parametrize("bits", BITS)
def test_gradient_of_half_base_and_quantised_tasks(bits):
    base = model(torch.bfloat16, [(50,), (9, 9)])
    tasks = [[QuantizedTensor.quantize(t, bits) for t in model(shapes=[(50,), (9, 9)])], model(shapes=[(50,), (9, 9)])]
    gradients = []
    for function in (weighted_merge, weighted_merge_reference):
        coefficients = torch.full((2,), 0.3, requires_grad=True)
        sum(m.float().sum() for m in function(base, tasks, coefficients)).backward()
        gradients.append(coefficients.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_does_not_depend_on_threads(with_threads):
    base, tasks = model(shapes=[(100_003,), (77, 501)]), [model(shapes=[(100_003,), (77, 501)]) for _ in range(2)]

    def run() -> list[Tensor]:
        coefficients = torch.full((2, 2), 0.3, requires_grad=True)
        merged = weighted_merge(base, tasks, coefficients)
        sum((m**2).sum() for m in merged).backward()
        return [*(m.detach() for m in merged), coefficients.grad]

    assert all(torch.equal(a, b) for a, b in zip(with_threads(1, run), with_threads(2, run)))


@st.composite
def kinds_of_task_vectors(draw: st.DrawFn) -> list[tuple[torch.dtype, int, int | None]]:
    """(dtype, bits or 0, group size) for each of up to 9 tasks."""
    kind = st.tuples(st.sampled_from(DTYPES), st.sampled_from([0, *BITS]), st.sampled_from([None, 8, 24, 64]))
    return draw(st.one_of(st.lists(kind, max_size=9), st.builds(lambda one, n: [one] * n, kind, st.integers(1, 9))))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    kinds_of_task_vectors(),
    st.booleans(),
    st.sampled_from(_C.build_info()["cpu_targets"]),
)
def test_any_model(shapes, dtype, kinds, transposed, target):
    def strided(x: Tensor) -> Tensor:  # the same values, not contiguous, and from an odd offset of the storage on
        return torch.cat([x.new_zeros(1), x.mT.flatten()])[1:].view(x.mT.shape).mT if transposed and x.dim() > 1 else x

    base = [strided(b) for b in model(dtype, shapes)]
    taus: list[list[Tensor | QuantizedTensor]] = []
    for task_dtype, bits, group_size in kinds:
        task = model(task_dtype, shapes)
        taus.append([QuantizedTensor.quantize(t, bits, group_size) if bits else strided(t) for t in task])
    results = []
    before = _C.cpu_target()
    _C.set_cpu_target(target)
    try:
        for merge in (weighted_merge, weighted_merge_reference):
            torch.manual_seed(1)
            coefficients = torch.randn(len(shapes), len(kinds), dtype=torch.float64, requires_grad=True)
            merged = merge(base, taus, coefficients)
            if kinds:
                torch.autograd.backward(merged, [torch.randn(m.shape).to(m.dtype) for m in merged])
            results.append([*merged, *([coefficients.grad] if kinds else [])])
    finally:
        _C.set_cpu_target(before)
    for ours, theirs, exact in zip(*results, [*base, torch.zeros(0, dtype=torch.float32)]):
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(exact.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_nan_and_infinity_spread_as_in_torch(value, coefficient):
    base, tau = torch.ones(100), torch.ones(100)
    tau[37] = value
    peer = weighted_merge_reference([base], [[tau]], torch.tensor([coefficient]))[0]
    torch.testing.assert_close(weighted_merge([base], [[tau]], [coefficient])[0], peer, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8, 4096])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 5000, 9001])
def test_quantisation_is_within_half_a_step(bits, group_size, numel):
    x = torch.randn(numel)
    q = QuantizedTensor.quantize(x, bits, group_size)
    restored = q.dequantize()
    assert restored.shape == x.shape
    groups = x.split(q.group_size) if numel else ()
    for part, back in zip(groups, restored.split(q.group_size)):
        step = (part.max() - part.min()) / (2**bits - 1)
        # rounding the zero point can move an end of the range out by up to half a step
        assert (part - back).abs().max() <= 1.001 * step + 1e-6
        assert (part - back).abs().mean() <= 0.5 * step + 1e-6
    assert q.codes.numel() == -(-numel // 8) * bits


@pytest.mark.parametrize("bits", BITS)
def test_quantisation_follows_the_published_formula(bits):
    x = torch.randn(4000, dtype=torch.float64)
    step = ((x.max() - x.min()) / (2**bits - 1)).float().double()
    zero = -torch.round(x.min() / step)
    codes = (torch.round(x / step) + zero).clamp(0, 2**bits - 1)
    torch.testing.assert_close(
        QuantizedTensor.quantize(x, bits).dequantize(torch.float64), step * (codes - zero), rtol=1e-6, atol=1e-7
    )


def test_constants_are_kept_exactly():
    for value in (0.0, 0.1, -3e20, 1e-30):
        x = torch.full((20,), value)
        assert torch.equal(QuantizedTensor.quantize(x, 2).dequantize(), x)


@pytest.mark.parametrize("bits", BITS)
def test_merge_restores_the_codes(bits):
    x = torch.randn(9001)
    q = QuantizedTensor.quantize(x, bits, 64)
    torch.testing.assert_close(weighted_merge([torch.zeros(9001)], [[q]], [1.0])[0], q.dequantize(), rtol=0, atol=0)


def test_bad_quantisation_arguments_are_named():
    with pytest.raises(ValueError, match=r"bits: expected one of \(2, 3, 4, 8\), got 5"):
        QuantizedTensor.quantize(torch.ones(3), 5)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 8, got 12"):
        QuantizedTensor.quantize(torch.ones(3), 4, 12)
    with pytest.raises(ValueError, match="tensor: expected finite values, got NaN or Inf"):
        QuantizedTensor.quantize(torch.tensor([torch.nan]), 4)
    q = QuantizedTensor.quantize(torch.ones(30), 4)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 8, or all 30 elements, got 12"):
        QuantizedTensor(q.codes, q.scale, q.zero_point, 4, 12, q.shape)
    with pytest.raises(
        ValueError, match=r"codes: expected torch.uint8 of shape \[16\], got torch.uint8 of shape \[15\]"
    ):
        QuantizedTensor(q.codes[:15], q.scale, q.zero_point, 4, q.group_size, q.shape)


ONE = [torch.ones(3)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (ONE, [[torch.ones(4)]], [1.0]),
            ValueError,
            r"task_vectors\[0\]\[0\]: expected shape \[3\] as of base\[0\], got \[4\]",
        ),
        (
            (ONE, [ONE, []], [1.0, 1.0]),
            ValueError,
            r"task_vectors\[1\]: expected 1 tensors, one for every one of base, got 0",
        ),
        ((ONE, [ONE], [1.0, 2.0]), ValueError, r"coefficients: expected shape \[1\], got \[2\]"),
        (
            (ONE, [ONE], torch.ones(2, 1)),
            ValueError,
            r"coefficients: expected shape \[K\] = \[1\] or \[L, K\] = \[1, 1\], got \[2, 1\]",
        ),
        ((ONE, [ONE], torch.ones(1, dtype=torch.int64)), TypeError, "coefficients: expected float64 .*, got int64"),
        (([torch.ones(3).long()], [ONE], [1.0]), TypeError, r"base\[0\]: expected float64 .*, got int64"),
        ((ONE, [[torch.ones(3).long()]], [1.0]), TypeError, r"task_vectors\[0\]\[0\]: expected float64 .*, got int64"),
        (
            (ONE, torch.ones(1, 1, 3), [1.0]),
            TypeError,
            "task_vectors: expected a sequence of K sequences of tensors, got Tensor",
        ),
        (
            (ONE, [[torch.ones(3, device="meta")]], [1.0]),
            ValueError,
            r"task_vectors\[0\]\[0\]: expected a tensor on cpu",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        weighted_merge(*arguments)


def test_numpy_round_trip():
    rng = np.random.default_rng(0)
    base, tau = rng.standard_normal((4, 5)), rng.standard_normal((4, 5)).astype(np.float32)
    tau.flags.writeable = False
    merged = weighted_merge([base], [[tau]], np.array([0.5]))
    assert isinstance(merged[0], np.ndarray) and merged[0].dtype == np.float64
    np.testing.assert_allclose(merged[0], base + 0.5 * tau, rtol=1e-12)


class DLPackOnly:
    """An array of an unknown library: nothing but the DLPack protocol."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def from_dlpack(tensor: Tensor) -> DLPackOnly:
    return DLPackOnly(tensor)


def test_dlpack_round_trip():
    # from_dlpack of the array's own module, here this one, turns results back, as cupy.from_dlpack does
    merged = weighted_merge([DLPackOnly(torch.ones(3))], [[DLPackOnly(torch.ones(3))]], [2.0])
    assert isinstance(merged[0], DLPackOnly) and merged[0].tensor.tolist() == [3, 3, 3]


def test_opcheck(opcheck):
    base, tau = model(shapes=[(5,), (2, 3)]), model(shapes=[(5,), (2, 3)])
    coefficients = torch.rand(2, 1)
    opcheck("weighted_merge", base, tau, [], [], [], [], coefficients)
    opcheck("weighted_merge_grad", base, tau, [], [], [], [])
    q = [QuantizedTensor.quantize(t, 3) for t in tau]
    quantised = [[getattr(x, name) for x in q] for name in ("codes", "scale", "zero_point", "bits", "group_size")]
    opcheck("weighted_merge", base, *quantised, coefficients)
    opcheck("weighted_merge_grad", base, *quantised)


@pytest.mark.parametrize("quantised", [False, True])
def test_traces_in_one_graph_with_gradients(quantised):
    base, *tasks = (model(shapes=[(5,), (2, 3)]) for _ in range(3))
    if quantised:
        tasks = [[QuantizedTensor.quantize(t, 4) for t in task] for task in tasks]

    def f(coefficients: Tensor) -> Tensor:
        return sum((m**2).sum() for m in weighted_merge(base, tasks, torch.tanh(coefficients)))

    gradients = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        coefficients = torch.full((2, 2), 0.3, requires_grad=True)
        function(coefficients).backward()
        gradients.append(coefficients.grad)
    torch.testing.assert_close(*gradients)
