"""LoRA adapters in PEFT's format: reading them as experts, and writing them.

An adapter is a directory with adapter_config.json and adapter_model.safetensors (or .bin). For a module with factors A
[r, in] and B [out, r] it means W_0 + s · B A with s = alpha / r, or alpha / √r for rank-stabilised LoRA (LoRA, arXiv
2106.09685; rsLoRA, arXiv 2312.03732). Factors of convolutions have the kernel's dimensions too, those of an embedding
and of weights stored [in, out] mean the transpose of B A. Tensors that an adapter holds as a whole replace the base's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from statsmerge_ext.checkpoints.compatibility import dtype_of, floating_names, shape_of
from statsmerge_ext.checkpoints.header import TensorInfo
from statsmerge_ext.checkpoints.reading import Checkpoint, open_checkpoint, read_json
from statsmerge_ext.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.default)?(\.weight)?")
#: Entries of the configuration with which an adapter is more than W_0 + s · B A, and why it is then refused.
_REFUSED = {
    "use_dora": "DoRA rescales the columns of the adapted weight, which is no product of two factors any more; merge "
    "the adapter into its base with PEFT and give that as the expert",
    "lora_bias": "its factors have biases of their own; merge the adapter into its base with PEFT first",
    "layer_replication": "it repeats layers that the base has once",
    "trainable_token_indices": "it replaces single rows of the embedding; merge it into its base with PEFT first",
    "target_parameters": "it adapts bare parameters; merge it into its base with PEFT first",
    "alora_invocation_tokens": "it acts on a part of the tokens only, which no merged weight can",
}
#: Initialisations that also change the base's weights: the adapter belongs to another base than it names.
_CHANGED_BASES = ("pissa", "olora", "corda")


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: ``scaling`` · B A, or its transpose.

    Attributes:
        a, b: [r, …] and [out, r, …], as they are stored.
        scaling: s.
        embedding: whether they are those of an embedding.
        transposed: whether the weight takes the transpose of the product.
    """

    a: Tensor
    b: Tensor
    scaling: float
    embedding: bool
    transposed: bool

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The change of the weight as a matrix, computed in ``dtype``."""
        delta = (self.scaling * self.b.flatten(1).to(dtype)) @ self.a.flatten(1).to(dtype)
        return delta.T if self.transposed else delta


class Adapter:
    """A LoRA adapter of a given base.

    Args:
        path: its directory.
        base: the model it was trained on, a `Checkpoint` or a state dict.

    Attributes:
        config: the content of adapter_config.json.
        factors: name of the base's tensor → what is added to it.
        modules: name of the base's tensor → name of the module in the adapter's file.
        replaced: name of the base's tensor → name of the adapter's tensor that replaces it.

    Raises:
        CheckpointError: it cannot be read, is of a kind that is refused (DoRA and others; the message says why), or
            does not fit the base.
    """

    def __init__(self, path: Path, base: Mapping[str, Tensor]) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self._check_config()
        file = next((path / name for name in WEIGHTS if (path / name).exists()), None)
        if file is None:
            raise CheckpointError(f"{path}: holds none of {', '.join(WEIGHTS)}")
        self.weights = open_checkpoint(file)
        self.factors: dict[str, Factors] = {}
        self.modules: dict[str, str] = {}
        self.replaced: dict[str, str] = {}
        pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
        for key in self.weights:
            if match := _FACTOR.fullmatch(key):
                pairs.setdefault((match["module"], bool(match["kind"])), {})[match["factor"]] = self.weights[key]
            elif "lora_magnitude_vector" in key:
                raise CheckpointError(f"{path}: is refused: {_REFUSED['use_dora']}")
            else:
                name = self._name_in(base, key.replace(".base_layer.", "."))
                # PEFT saves an adapted embedding beside its factors, whether it is another than the base's or not.
                if ".base_layer." not in key or not torch.equal(self.weights[key], base[name].to(self.weights[key])):
                    self.replaced[name] = key
        for (module, embedding), pair in pairs.items():
            self._add(base, module, embedding, pair)

    def _check_config(self) -> None:
        where = self.path / CONFIG
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(f"{where}: is an adapter of type {self.config.get('peft_type')!r}, expected LORA")
        for key, reason in _REFUSED.items():
            if self.config.get(key):
                raise CheckpointError(f"{where}: {key} is refused: {reason}")
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
            raise CheckpointError(
                f"{where}: init_lora_weights {start!r} is refused: it changes the base's weights, so the adapter fits "
                "no other; have PEFT convert it to a plain LoRA when it is saved"
            )
        for key in ("r", "lora_alpha"):
            if type(self.config.get(key)) not in (int, float) or not self.config[key] > 0:
                raise CheckpointError(f"{where}: {key}: expected a positive number, got {self.config.get(key)!r}")

    def _add(self, base: Mapping[str, Tensor], module: str, embedding: bool, pair: dict[str, Tensor]) -> None:
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{self.path}: module {module!r} has one of the factors A and B only")
        a, b = pair["A"], pair["B"]
        name = self._name_in(base, f"{module}.weight")
        if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{self.path}: module {module!r}: A of shape {list(a.shape)} and B of shape {list(b.shape)} do not fit"
            )
        transposed = embedding or bool(self.config.get("fan_in_fan_out"))
        rank = a.shape[0]
        alpha = self._alpha(module.removeprefix(_PREFIX))
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        shape, product = shape_of(base, name), (b.shape[0], a[0].numel())
        if shape.numel() != math.prod(product) or shape[0] != product[1 if transposed else 0]:
            raise CheckpointError(
                f"{self.path}: module {module!r}: its factors make {list(product)}{' transposed' * transposed}, "
                f"but tensor {name!r} of the base has shape {list(shape)}"
            )
        self.factors[name] = Factors(a, b, scaling, embedding, transposed)
        self.modules[name] = module

    def _alpha(self, module: str) -> float:
        for pattern, alpha in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.config["lora_alpha"]

    def _name_in(self, base: Mapping[str, Tensor], key: str) -> str:
        """The base's name of an adapter's tensor; one of them may have a prefix for the model without its head."""
        name = key.removeprefix(_PREFIX)
        if name in base:
            return name
        similar = [other for other in base if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if len(similar) != 1:
            raise CheckpointError(f"{self.path}: adapts {name!r}, which the base lacks")
        return similar[0]


class AdaptedExpert:
    """An adapter on its base, in the place of a file of a `Checkpoint`."""

    def __init__(self, adapter: Adapter, base: Mapping[str, Tensor]) -> None:
        self.path, self.metadata = adapter.path, {}
        self.files = [adapter.path / CONFIG, adapter.weights.path]
        self.adapter = adapter
        self._base = base
        self.infos = {
            name: TensorInfo(shape_of(base, name), torch.promote_types(dtype_of(base, name), torch.float32))
            for name in floating_names(base)
        }

    def read(self, name: str) -> Tensor:
        dtype = self.infos[name].dtype
        whole = self.adapter.replaced.get(name)
        weight = (self._base[name] if whole is None else self.adapter.weights[whole]).to(dtype)
        if name in self.adapter.factors:
            weight = weight + self.adapter.factors[name].product(dtype).reshape(weight.shape).to(weight.device)
        return weight


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter instead of a model."""
    return (path / CONFIG).exists() and not (path / "config.json").exists()


def open_adapter(path: Path, base: Mapping[str, Tensor], device: str | torch.device) -> Checkpoint:
    """An adapter as an expert: the base plus what it adds. Raises CheckpointError as :class:`Adapter`."""
    expert = AdaptedExpert(Adapter(path, base), base)
    config = base.config if isinstance(base, Checkpoint) else None
    return Checkpoint(path, config, dict.fromkeys(expert.infos, expert), device, None)


def adapter_files(config: Mapping[str, object], factors: Mapping[str, Factors]) -> tuple[str, dict[str, Tensor]]:
    """The text of adapter_config.json, and the tensors, of an adapter.

    Args:
        config: what the configuration says beside ranks and modules.
        factors: module's name in the file (with PEFT's prefix) → factors; their scaling is put into B.
    """
    ranks = {module.removeprefix(_PREFIX): of_module.a.shape[0] for module, of_module in factors.items()}
    rank = max(ranks.values(), default=1)
    other = {module: of_module for module, of_module in ranks.items() if of_module != rank}
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        **config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
    }
    tensors = {}
    for module, of_module in factors.items():
        kind, suffix = ("embedding_", "") if of_module.embedding else ("", ".weight")
        tensors[f"{module}.lora_{kind}A{suffix}"] = of_module.a
        tensors[f"{module}.lora_{kind}B{suffix}"] = of_module.scaling * of_module.b
    return json.dumps(content, indent=2) + "\n", tensors
