"""The shapes of the models that the cases are made of."""

from __future__ import annotations

Shape = tuple[int, ...]


def vit_b32() -> list[Shape]:
    """All weights of CLIP's ViT-B/32 image tower with two dimensions; the patch embedding flattened."""
    block = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [(768, 3072), (512, 768), *block * 12]


def vit_b32_vectors() -> list[Shape]:
    return [(768,), *[(768,)] * (12 * 9 + 4), *[(3072,)] * 12]


def llama_8b(layers: int = 32) -> list[Shape]:
    block = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    return [(128256, 4096)] * 2 + block * layers


def shrunk(shapes: list[Shape]) -> list[Shape]:
    """A few of the shapes, small: for a run that only tests the benchmark."""
    return [tuple(max(1, n // 64) for n in shape) for shape in shapes[:4]]
