"""Running a module with other models' weights in place, and sums of symmetric matrices in half their memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statsmerge_ext.evidence.borrowed import borrow, borrowing_copy
from statsmerge_ext.evidence.triangle import TriangleSum


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def modules():
    torch.manual_seed(0)
    module, other = Tied(), Tied()
    other.norm.running_mean.normal_()
    return module.eval(), other.eval()


def memory_of(module):
    return [parameter.data_ptr() for parameter in module.parameters()]


def test_a_copy_borrows_weights_without_touching_either_module(modules):
    module, other = modules
    before = [{key: value.clone() for key, value in m.state_dict().items()} for m in modules]
    copy, x = borrowing_copy(module), torch.randn(5, 4)
    assert memory_of(copy) == memory_of(module)
    borrow(copy, other.state_dict())
    assert memory_of(copy) == memory_of(other) and copy.second.weight is copy.first.weight
    assert torch.equal(copy(x), other(x))
    copy.train()(x)  # moves the statistics of its own BatchNorm
    for m, state in zip(modules, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in m.state_dict().items())
        assert all(parameter.requires_grad for parameter in m.parameters())


def test_what_a_state_lacks_stays_and_one_name_of_tied_weights_is_enough(modules):
    module, other = modules
    copy, x = borrowing_copy(module), torch.randn(5, 4)
    state = other.state_dict()
    del state["second.weight"], state["second.bias"]
    borrow(copy, state)
    assert torch.equal(copy.second.weight, other.first.weight) and torch.equal(copy.second.bias, module.second.bias)
    assert not torch.equal(copy(x), other(x))


def test_weights_of_another_dtype_are_converted(modules):
    module, other = modules
    copy = borrowing_copy(module)
    borrow(copy, {key: value.double() for key, value in other.state_dict().items()})
    assert copy.first.weight.dtype == torch.float32
    torch.testing.assert_close(copy.first.weight, other.first.weight, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 512, 512), (1, 1300, 1300), (1, 0, 0)])
def test_triangles_add_up(shape):
    matrices = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    total = TriangleSum(matrices[0])
    for lower in matrices:
        total.add(lower)
    lower = sum(matrices).tril()
    assert torch.equal(total.whole(), lower + lower.tril(-1).mT)
