"""weighted_merge and its gradient on CUDA, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statsmerge_ext.ops import QuantizedTensor, weighted_merge
from statsmerge_ext.ops.weighted_merge import weighted_merge_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5,), (0,), (3, 4, 2), (100, 130), (), (4096,), (4097,), (3, 8192), (1_000_003,)]


def model(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def moved(value, device):
    if isinstance(value, QuantizedTensor):
        tensors = (getattr(value, name).to(device) for name in ("codes", "scale", "zero_point"))
        return QuantizedTensor(*tensors, value.bits, value.group_size, value.shape)
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device)


def exact_merge(base: list[Tensor], tasks: list[list], coefficients: Tensor) -> list[Tensor]:
    double = [[t.dequantize().double() if isinstance(t, QuantizedTensor) else t.double() for t in row] for row in tasks]
    return weighted_merge_reference([b.double() for b in base], double, coefficients.double())


def assert_merged(merged: list[Tensor], base: list[Tensor], tasks: list[list], coefficients: Tensor) -> None:
    peers = weighted_merge_reference(base, tasks, coefficients)
    for ours, peer, exact, tensor in zip(merged, peers, exact_merge(base, tasks, coefficients), base):
        assert ours.is_cuda and ours.dtype == tensor.dtype and ours.shape == tensor.shape and ours.is_contiguous()
        scale = exact.norm().item() or 1.0
        error, allowed = (ours.cpu().double() - exact).norm().item(), 2 * (peer.double() - exact).norm().item()
        assert error <= allowed + torch.finfo(tensor.dtype).eps * scale


@pytest.mark.sanitize
def test_the_kernels_are_native():
    for name in ("weighted_merge", "weighted_merge_grad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"statsmerge::{name}", "CUDA")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task_dtype", DTYPES)
@pytest.mark.parametrize("layer_wise", [False, True])
def test_matches_float64(device, dtype, task_dtype, layer_wise):
    base, tasks = model(dtype), [model(task_dtype) for _ in range(3)]
    coefficients = torch.randn(*([len(base)] if layer_wise else []), 3)
    merged = weighted_merge(moved(base, device), moved(tasks, device), coefficients.to(device))
    assert_merged(merged, base, tasks, coefficients)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_task_vectors(device, dtype):
    shapes = [(7,), (0,), (4096,), (33, 127)]
    base = model(dtype, shapes)
    tasks = [model(task_dtype, shapes) for task_dtype in DTYPES]
    tasks += [[QuantizedTensor.quantize(t, bits, 64) for t in model(shapes=shapes)] for bits in (2, 3, 4, 8)]
    coefficients = torch.randn(len(base), len(tasks))
    merged = weighted_merge(moved(base, device), moved(tasks, device), coefficients.to(device))
    assert_merged(merged, base, tasks, coefficients)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 8, 24, 64, 4104])
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 5000, 90_001])
def test_codes_are_restored_exactly(device, bits, group_size, numel):
    quantised = QuantizedTensor.quantize(torch.randn(numel), bits, group_size)
    zeros = [torch.zeros(numel, device=device)]
    assert torch.equal(weighted_merge(zeros, [[moved(quantised, device)]], [1.0])[0].cpu(), quantised.dequantize())


def test_groups_that_no_pack_lies_in(device):
    numel, group = 1000, 12
    groups = -(-numel // group)
    codes = torch.randint(0, 256, (numel // 8 * 4,), dtype=torch.uint8)
    zero_points = torch.randint(-5, 20, (groups,), dtype=torch.int32)
    quantised = QuantizedTensor(codes, torch.rand(groups), zero_points, 4, group, torch.Size([numel]))
    merged = weighted_merge([torch.zeros(numel, device=device)], [[moved(quantised, device)]], [1.0])
    assert torch.equal(merged[0].cpu(), quantised.dequantize())


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_tensors(device, dtype, offset):
    numel = 5001
    flat = [torch.randn(numel + offset).to(dtype) for _ in range(3)]
    base, *taus = (t[offset:] for t in flat)
    on_device = [t.to(device)[offset:] for t in flat]
    assert on_device[0].data_ptr() % 16
    coefficients = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for mixed in ([on_device[0]], [on_device[0].clone()]):
        merged = weighted_merge(mixed, [[on_device[1]], [on_device[2].clone()]], coefficients.to(device))
        assert_merged(merged, [base], [[t] for t in taus], coefficients)


def test_strides(device):
    base, tau = torch.randn(60, 40).T, torch.randn(80, 120)[::2, ::2]
    merged = weighted_merge([base.to(device)], [[tau.to(device)]], [0.5])[0]
    assert merged.is_contiguous()
    torch.testing.assert_close(merged.cpu(), base + 0.5 * tau)


def test_half_types_round_as_torch_does(device):
    values = torch.cat(
        [torch.randn(5000), torch.randn(5000) * 1e-7, torch.tensor([65519.0, 65520.0, 1e30, torch.inf, -torch.inf])]
    ).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        base = torch.zeros(len(values), dtype=dtype, device=device)
        assert torch.equal(weighted_merge([base], [[values]], [1.0])[0], values.to(dtype))


def test_every_half_value_is_read_exactly(device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        tau = bits.view(dtype).to(device)
        merged = weighted_merge([torch.zeros(len(bits), device=device)], [[tau]], [1.0])[0]
        torch.testing.assert_close(merged, tau.float(), rtol=0, atol=0, equal_nan=True)


def test_no_tasks_and_no_elements(device):
    base = moved(model(), device)
    for coefficients in (torch.zeros(0), torch.zeros(len(base), 0)):
        assert all(torch.equal(m, b) for m, b in zip(weighted_merge(base, [], coefficients.to(device)), base))
    empty = torch.zeros(0, 3, device=device)
    assert weighted_merge([empty], [[empty]], [1.0])[0].shape == (0, 3)


def test_many_small_tensors(device):
    """More tensors than a warp finds in one step, among them some without elements."""
    shapes = [(i % 5 * 3,) for i in range(2500)]
    base, tau = model(shapes=shapes), model(shapes=shapes)
    merged = weighted_merge(moved(base, device), [moved(tau, device)], [2.0])
    torch.testing.assert_close(torch.cat(merged).cpu(), torch.cat(base) + 2 * torch.cat(tau))


def gradients(base: list, tasks: list, upstream: list[Tensor], tasks_count: int, function, dtype, device) -> Tensor:
    coefficients = torch.full((len(base), tasks_count), 0.3, dtype=dtype, device=device, requires_grad=True)
    merged = function(base, tasks, coefficients)
    torch.autograd.backward(merged, [g.to(m.device, m.dtype) for g, m in zip(upstream, merged)])
    return coefficients.grad


@pytest.mark.parametrize("task_dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 8, 9, 20])
def test_gradient_matches_float64(device, task_dtype, count):
    shapes = [(30_000,), (7,), (0,), (64, 65)]
    base, tasks, upstream = (
        model(shapes=shapes),
        [model(task_dtype, shapes) for _ in range(count)],
        model(shapes=shapes),
    )
    ours = gradients(moved(base, device), moved(tasks, device), upstream, count, weighted_merge, torch.float32, device)
    peer = gradients(base, tasks, upstream, count, weighted_merge_reference, torch.float32, "cpu")
    exact = gradients(base, tasks, upstream, count, exact_merge, torch.float64, "cpu")
    error = (ours.cpu().double() - exact).norm()
    assert error <= 2 * (peer.double() - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", [3, 4])
def test_gradient_of_half_base_and_quantised_tasks(device, bits):
    shapes = [(5001,), (9, 9)]
    base, upstream = model(torch.bfloat16, shapes), model(torch.bfloat16, shapes)
    tasks = [[QuantizedTensor.quantize(t, bits, 32) for t in model(shapes=shapes)], model(shapes=shapes)]
    ours = gradients(moved(base, device), moved(tasks, device), upstream, 2, weighted_merge, torch.float64, device)
    exact = gradients(base, tasks, upstream, 2, exact_merge, torch.float64, "cpu")
    torch.testing.assert_close(ours.cpu(), exact, rtol=1e-6, atol=1e-4)


def test_gradcheck(device):
    shapes = [(3,), (2, 4)]
    base = [b.double().to(device).requires_grad_() for b in model(shapes=shapes)]
    tasks = [t.double().to(device).requires_grad_() for _ in range(2) for t in model(shapes=shapes)]
    coefficients = torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def f(coefficients: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(weighted_merge(flat[:2], [flat[2:4], flat[4:]], coefficients))

    assert torch.autograd.gradcheck(f, (coefficients, *base, *tasks))


def test_two_runs_are_the_same(device):
    shapes = [(100_003,), (77, 501)]
    base, tasks = moved(model(torch.bfloat16, shapes), device), [moved(model(shapes=shapes), device) for _ in range(3)]

    def run() -> list[Tensor]:
        coefficients = torch.full((2, 3), 0.3, device=device, requires_grad=True)
        merged = weighted_merge(base, tasks, coefficients)
        sum((m.float() ** 2).sum() for m in merged).backward()
        return [*(m.detach() for m in merged), coefficients.grad]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_follows_the_current_stream(device):
    stream = torch.cuda.Stream(device)
    base, tau = torch.randn(2_000_000, device=device), torch.zeros(2_000_000, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        tau += 1  # the merge must see this
        merged = weighted_merge([base], [[tau]], [1.0])[0]
    stream.synchronize()
    assert torch.equal(merged, base + 1)


def test_does_not_wait_for_the_device(device):
    base, tau = torch.randn(1000, device=device), torch.randn(1000, device=device)
    coefficients = torch.ones(1, device=device)
    weighted_merge([base], [[tau]], coefficients)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weighted_merge([base], [[tau]], coefficients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tables_survive_many_calls_in_flight(device):
    base = [torch.randn(50, device=device) for _ in range(20)]
    torch.cuda._sleep(50_000_000)  # the calls below queue up behind this
    merged = [weighted_merge(base, [base], [float(i)]) for i in range(100)]
    for i, tensors in enumerate(merged):
        torch.testing.assert_close(tensors[7], base[7] * (1 + i))


def test_tables_of_task_vectors_are_found_again(device):
    """More models in turn than tables are kept, on two streams; memory used again by tensors of another type."""
    base = [torch.randn(50, device=device) for _ in range(5)]
    models = [[torch.randn(50, device=device) for _ in range(5)] for _ in range(12)]
    streams = [torch.cuda.current_stream(device), torch.cuda.Stream(device)]
    for _ in range(2):
        for tasks in models:
            for stream in streams:
                stream.wait_stream(streams[0])
                with torch.cuda.stream(stream):
                    merged = weighted_merge(base, [tasks], [2.0])
                stream.synchronize()
                for ours, b, t in zip(merged, base, tasks):
                    torch.testing.assert_close(ours, b + 2 * t)
    for dtype in DTYPES * 3:
        tasks = [torch.randn(50, device=device).to(dtype) for _ in range(5)]
        for ours, b, t in zip(weighted_merge(base, [tasks], [2.0]), base, tasks):
            torch.testing.assert_close(ours, (b.double() + 2 * t.double()).float())
        del tasks


def test_is_captured_in_a_graph(device):
    shapes = [(1000,), (33, 127)]
    base, tasks = moved(model(shapes=shapes), device), [moved(model(shapes=shapes), device) for _ in range(2)]
    coefficients, flat = torch.ones(2, 2, device=device), [t for task in tasks for t in task]

    def run() -> tuple[list[Tensor], Tensor]:
        merged = weighted_merge(base, tasks, coefficients)
        return merged, torch.ops.statsmerge.weighted_merge_grad(merged, flat, [], [], [], [])

    run()  # whatever is set up once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged, products = run()
    for _ in range(10):  # other tables, where the memory of those in the graph must not be
        weighted_merge([b.clone() for b in base], [[t.clone() for t in task] for task in tasks], coefficients)
    for scale in (1.0, -0.5):
        coefficients.fill_(scale)
        graph.replay()
        expected = run()
        assert all(torch.equal(a, b) for a, b in zip(merged, expected[0])) and torch.equal(products, expected[1])


def test_a_tensor_of_more_than_two_to_the_31_elements(device):
    numel = 2**31 + 11
    base = torch.ones(numel, dtype=torch.bfloat16, device=device)
    tau = torch.arange(256, device=device).to(torch.bfloat16).repeat(numel // 256 + 1)[:numel]
    merged = weighted_merge([base], [[tau]], [1.0])[0]
    for part in (slice(0, 1000), slice(2**31 - 500, numel)):
        assert torch.equal(merged[part], (base[part] + tau[part]))
    del merged
    raw = torch.ops.statsmerge.weighted_merge_grad([base], [tau], [], [], [], [])
    assert raw.item() == tau.sum(dtype=torch.float64).item()


def test_devices_are_not_mixed(device):
    with pytest.raises(ValueError, match=r"task_vectors\[0\]\[0\]: expected a tensor on cuda"):
        weighted_merge([torch.ones(3, device=device)], [[torch.ones(3)]], [1.0])


def test_opcheck(device):
    base, tau = moved(model(shapes=[(5,), (2, 3)]), device), moved(model(shapes=[(5,), (2, 3)]), device)
    coefficients = torch.rand(2, 1, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.statsmerge
    arguments = (base, tau, [], [], [], [])
    torch.library.opcheck(operators.weighted_merge.default, (*arguments, coefficients), test_utils=checks)
    torch.library.opcheck(operators.weighted_merge_grad.default, arguments, test_utils=checks)
