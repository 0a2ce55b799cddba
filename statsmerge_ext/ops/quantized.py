"""Quantised task vectors (TVQ, arXiv 2503.06921): codes of 2, 3, 4 or 8 bits, a scale and a zero point a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import as_tensor, check_dtype, fail

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as packed codes: value = scale · (code − zero point).

    codes: [bytes] uint8: codes packed without gaps, least significant bits first, padded to a whole number of 8 codes
    scale: [groups] float32; zero_point: [groups] int32
    group_size: how many elements in a row share a scale: a multiple of 8, or all of them
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int
    shape: torch.Size

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            fail("bits", f"one of {BITS}", self.bits)
        numel = self.shape.numel()
        if self.group_size < 1 or (self.group_size % 8 and self.group_size < numel):
            fail("group_size", f"a multiple of 8, or all {numel} elements", self.group_size)
        groups = -(-numel // self.group_size)
        expected = {
            "codes": (self.codes, torch.uint8, [-(-numel // 8) * self.bits]),
            "scale": (self.scale, torch.float32, [groups]),
            "zero_point": (self.zero_point, torch.int32, [groups]),
        }
        for name, (tensor, dtype, shape) in expected.items():
            if tensor.dtype != dtype or list(tensor.shape) != shape:
                fail(name, f"{dtype} of shape {shape}", f"{tensor.dtype} of shape {list(tensor.shape)}")

    @classmethod
    def quantize(cls, tensor: Any, bits: int = 4, group_size: int | None = None) -> QuantizedTensor:
        """Quantise with Δ = (max − min) / (2^bits − 1) and q = round(τ / Δ) + z for every group; z = −round(min / Δ).

        A group whose values are all the same to float32's precision keeps that value exactly.

        Args:
            tensor: any shape; float64, float32, bfloat16 or float16; finite.
            bits: 2, 3, 4 or 8.
            group_size: elements that share Δ and z, a multiple of 8; None: all.
        """
        x = as_tensor(tensor, "tensor").detach()
        check_dtype(x, "tensor")
        if bits not in BITS:
            fail("bits", f"one of {BITS}", bits)
        if group_size is None:
            group_size = max(8, -(-x.numel() // 8) * 8)
        if group_size < 8 or group_size % 8:
            fail("group_size", "a multiple of 8", group_size)
        if not bool(torch.isfinite(x).all()):
            fail("tensor", "finite values", "NaN or Inf")
        shape, flat = x.shape, x.double().flatten()
        groups = -(-flat.numel() // group_size)
        if flat.numel():  # the last value fills the last group without changing its range
            flat = torch.cat([flat, flat[-1:].expand(groups * group_size - flat.numel())])
        grouped = flat.reshape(groups, group_size)
        low, high = (grouped.amin(1), grouped.amax(1)) if groups else (grouped.sum(1), grouped.sum(1))
        constant = high - low <= 2.0**-22 * torch.maximum(low.abs(), high.abs())
        # The codes are computed from the values that are stored, so that rounding Δ to float32 costs no accuracy.
        scale = torch.where(constant, low, (high - low) / (2**bits - 1)).float()
        step = torch.where(constant, 1.0, scale.double())
        step = torch.where(step == 0, 1.0, step)
        zero_point = torch.where(constant, -1.0, -torch.round(low / step))
        codes = torch.round(grouped / step.unsqueeze(1)) + zero_point.unsqueeze(1)
        codes = torch.where(constant.unsqueeze(1), 0, codes).clamp_(0, 2**bits - 1).to(torch.uint8).flatten()
        codes = codes[: -(-shape.numel() // 8) * 8]
        return cls(_pack(codes, bits), scale, zero_point.to(torch.int32), bits, group_size, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32."""
        numel = self.shape.numel()
        codes = _unpack(self.codes, self.bits)[:numel].float()
        group = torch.arange(numel, device=codes.device) // self.group_size
        return (self.scale[group] * (codes - self.zero_point[group].float())).reshape(self.shape).to(dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [8 n] → bytes [bits · n]."""
    shifts = torch.arange(8, device=codes.device, dtype=torch.int64) * bits
    # the eighth of eight 8-bit codes wraps into the sign bit, which the mask below takes off again
    words = (codes.reshape(-1, 8).to(torch.int64) << shifts).sum(1, keepdim=True)
    return (words >> torch.arange(bits, device=codes.device) * 8 & 0xFF).to(torch.uint8).flatten()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """bytes [bits · n] → uint8 codes [8 n]."""
    shifts = torch.arange(bits, device=packed.device, dtype=torch.int64) * 8
    words = (packed.reshape(-1, bits).to(torch.int64) << shifts).sum(1, keepdim=True)
    codes = words >> torch.arange(8, device=packed.device) * bits & (2**bits - 1)
    return codes.to(torch.uint8).flatten()
