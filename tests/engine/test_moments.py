"""Second moments and the affine maps fitted to them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statsmerge_ext import ops
from statsmerge_ext.engine.moments import Moments
from statsmerge_ext.evidence.observe import Geometry
from tests.closed_forms import relative_error

CONVOLUTIONS = {
    "pointwise": nn.Conv2d(6, 5, 1, stride=2),
    "plain": nn.Conv2d(3, 8, (3, 2), padding=(1, 0), dilation=(1, 2)),
    "grouped": nn.Conv2d(6, 9, 3, groups=3, stride=(2, 1)),
    "depthwise": nn.Conv2d(6, 6, 5, padding=2, groups=6),
    "line": nn.Conv1d(4, 6, 3, padding=1, groups=2),
    "volume": nn.Conv3d(2, 3, 2),
}


def geometry_of(conv):
    pairs = tuple((side, side) for side in conv.padding)
    return Geometry(conv.kernel_size, conv.stride, pairs, conv.dilation, conv.groups)


def plain(x, y):
    """The sums in float64, from rows x [rows, in] and y [rows, out]."""
    x, y = x.double(), y.double()
    return x.T @ x, y.T @ x, x.sum(0), y.sum(0), torch.tensor(len(x))


def check(moments, parts):
    ops.symmetrize_(moments.gram)
    for group, (gram, product, inputs, outputs, count) in enumerate(parts):
        ours = (moments.gram[group], moments.product[group], moments.inputs[group], moments.outputs[group])
        for value, expected in zip(ours, (gram, product, inputs, outputs), strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert moments.count == count


@pytest.mark.parametrize("memory", ["plain", "channels last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches(name, memory):
    conv, generator = CONVOLUTIONS[name], torch.Generator().manual_seed(0)
    dims = conv.weight.dim() - 2
    x = torch.randn(7, conv.in_channels, *[9, 8, 6][:dims], generator=generator)
    if memory == "channels last" and dims == 2:
        x = x.to(memory_format=torch.channels_last)
    y = torch.randn(conv(x).shape, generator=generator)
    moments = Moments.zeros_like(conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1))
    moments.add_patches(x[:3], y[:3], geometry_of(conv))
    moments.add_patches(x[3:], y[3:], geometry_of(conv))
    geometry = geometry_of(conv)
    patches = ops.gram.unfold_patches(
        x, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, conv.groups
    )
    targets = y.movedim(1, -1).flatten(0, -2).chunk(conv.groups, 1)
    check(moments, [plain(rows, target) for rows, target in zip(patches, targets, strict=True)])


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_and_channels(weighted):
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(4, 5, width, generator=generator) for width in (6, 3, 6))
    weight = (torch.rand(4, 5, generator=generator) > 0.4).long() if weighted else None
    kept = torch.ones(4, 5, dtype=torch.bool) if weight is None else weight == 1
    rows = Moments.zeros_like(torch.zeros(1, 3, 6))
    rows.add_rows(x, y, weight)
    check(rows, [plain(x[kept], y[kept])])
    channels = Moments.zeros_like(torch.zeros(6, 1, 1))
    channels.add_channels(x, z, weight)
    check(channels, [plain(x[kept][:, [c]], z[kept][:, [c]]) for c in range(6)])


@pytest.mark.parametrize("name", ["plain", "depthwise"])
def test_sums_do_not_depend_on_threads(name):
    conv, threads = CONVOLUTIONS[name], torch.get_num_threads()
    x = torch.randn(40, conv.in_channels, 16, 15)
    y = conv(x).detach()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moments = Moments.zeros_like(conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1))
            moments.add_patches(x, y, geometry_of(conv))
            moments.add(moments)
            results.append(moments)
    finally:
        torch.set_num_threads(threads)
    for field in fields(Moments):
        assert all(torch.equal(getattr(results[0], field.name), getattr(r, field.name)) for r in results[1:])


@pytest.mark.parametrize("shifted", [False, True])
def test_fit(shifted):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=generator).double() + 1, torch.randn(30, 4, generator=generator).double()
    anchor = torch.randn(1, 4, 5, generator=generator).double()
    moments = Moments.zeros_like(anchor)
    moments.add_rows(x, y, None)
    ops.symmetrize_(moments.gram)
    weight, shift = moments.fit(0.1, shifted=shifted, anchor=anchor)
    assert (shift is not None) == shifted
    rows, targets = (x - x.mean(0), y - y.mean(0)) if shifted else (x, y)
    root = (0.1 * rows.square().sum() / 5).sqrt()
    stacked = torch.cat([rows, root * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([targets, root * anchor[0].T])).solution.T
    torch.testing.assert_close(weight[0], expected)
    if shifted:
        torch.testing.assert_close(shift[0], (y - x @ expected.T).mean(0))


def test_channels_without_variance_keep_their_anchor():
    x = torch.randn(50, 3) * torch.tensor([1.0, 0.0, 0.0]) + torch.tensor([0.0, 0.0, 2.0])
    moments = Moments.zeros_like(torch.zeros(3, 1, 1))
    moments.add_channels(x, torch.randn(50, 3), None)
    anchor = torch.tensor([0.3, 0.4, 0.5]).reshape(3, 1, 1)
    weight, shift = moments.fit(1e-2, shifted=True, anchor=anchor)
    torch.testing.assert_close(weight[1:].float(), anchor[1:])
    assert weight.isfinite().all() and shift.isfinite().all()


def test_targets_of_a_map():
    x, w, b = torch.randn(20, 4), torch.randn(3, 4), torch.randn(3)
    moments = Moments.zeros_like(w.unsqueeze(0))
    moments.add_rows(x, torch.zeros(20, 3), None)
    ops.symmetrize_(moments.gram)
    expected = Moments.zeros_like(w.unsqueeze(0))
    expected.add_rows(x, F.linear(x, w, b), None)
    ours = moments.with_targets_of(w.unsqueeze(0), b)
    assert relative_error(ours.product, expected.product) <= 1e-6
    assert relative_error(ours.outputs, expected.outputs) <= 1e-6
