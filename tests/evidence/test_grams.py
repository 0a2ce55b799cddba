"""Collecting, masking, sharing, saving and loading Gram evidence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from statsmerge_ext import merge
from statsmerge_ext.engine.merging import default_forward
from statsmerge_ext.errors import CalibrationError, CheckpointError
from statsmerge_ext.evidence import GramEvidence, collect_grams
from statsmerge_ext.layers import find_layers
from tests.closed_forms import fine_tuned, make_experts, relative_error


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=40,
        max_position_embeddings=12,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def collect(base, experts, batches, **options):
    states = {name: expert.state_dict() for name, expert in experts.items()}
    layers = find_layers(base)
    return collect_grams(
        fine_tuned(base, 99), layers, base.state_dict(), states, batches, forward=default_forward, **options
    )


def texts(seed, lengths=(9, 4, 6), width=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def test_gram_of_each_expert_uses_its_own_features():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).eval()
    experts = make_experts(base)
    x = {name: torch.randn(11, 5) for name in experts}
    evidence = collect(base, experts, {k: [v[:4], v[4:]] for k, v in x.items()}, gram_dtype=torch.float64)
    hidden = [expert[1](expert[0](x[name])).double() for name, expert in experts.items()]
    grams = [h.T @ h for h in hidden]
    assert relative_error(evidence.grams["2.weight"][0], sum(grams)) < 1e-12
    moved = [(e[2].weight - base[2].weight).double() for e in experts.values()]
    assert (
        relative_error(evidence.products["2.weight"][0], sum(t @ g for t, g in zip(moved, grams, strict=True))) < 1e-6
    )
    diagonals = torch.stack([g.diagonal() for g in grams])
    assert relative_error(evidence.diagonals["2.weight"][:, 0], diagonals) < 1e-12


def test_grams_in_float64_know_more_digits():
    torch.manual_seed(0)
    base = nn.Linear(5, 7)
    batches = {"a": [torch.randn(11, 5)]}
    single, double = (
        collect(base, {"a": fine_tuned(base, 1)}, batches, gram_dtype=dtype).grams["weight"]
        for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32
    assert 0 < relative_error(single, double) < 1e-6


def test_query_key_and_value_share_a_gram():
    base = tiny_bert()
    evidence = collect(base, {"a": fine_tuned(base, 1)}, {"a": [texts(0), texts(1)]})
    attention = "encoder.layer.0.attention.self"
    leaders = {evidence.leaders[f"{attention}.{part}.weight"] for part in ("query", "key", "value")}
    assert leaders == {f"{attention}.query.weight"}
    assert evidence.leaders["encoder.layer.0.intermediate.dense.weight"] not in leaders
    alone = collect(base, {"a": fine_tuned(base, 1)}, {"a": [texts(0), texts(1)]}, share_inputs=False)
    assert len(alone.grams) == len(evidence.grams) + 4
    for part in ("query", "key", "value"):
        name = f"{attention}.{part}.weight"
        torch.testing.assert_close(alone.grams[name], evidence.grams[evidence.leaders[name]])


def test_padding_is_masked_everywhere():
    """A padded batch gives the sums of its texts one by one."""
    base = tiny_bert()
    expert, padded = fine_tuned(base, 1, scale=0.02), texts(3)
    single = [
        {key: value[row : row + 1, : int(padded["attention_mask"][row].sum())] for key, value in padded.items()}
        for row in range(3)
    ]
    together, apart = (collect(base, {"a": expert}, {"a": batches}) for batches in ([padded], single))
    for kind in ("grams", "products", "diagonals", "weights"):
        ours, reference = getattr(together, kind), getattr(apart, kind)
        assert ours.keys() == reference.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=1e-4, msg=f"{kind} of {name}")
    assert together.weights["embeddings.word_embeddings.weight"].sum() == 19
    assert together.weights["embeddings.position_embeddings.weight"][0, :4].tolist() == [3, 3, 3, 3]


def test_sequence_first_attention_is_masked():
    attention = nn.MultiheadAttention(8, 2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x, attention_mask):
            x = x.transpose(0, 1)
            return self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0]

    x, mask = torch.randn(3, 3, 8), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    base = Model().eval()
    evidence = collect(base, {"a": fine_tuned(base, 1)}, {"a": [{"x": x, "attention_mask": mask}]})
    kept = x[mask.bool()].double()
    assert relative_error(evidence.grams["attention.in_proj_weight[q]"][0], kept.T @ kept) < 1e-6


def test_a_shared_module_adds_up_its_calls():
    shared = nn.Linear(4, 4)
    base = nn.Sequential(shared, nn.Tanh(), shared).eval()
    expert, x = fine_tuned(base, 1), torch.randn(6, 4)
    evidence = collect(base, {"a": expert}, {"a": [x]})
    first, second = x.double(), torch.tanh(expert[0](x)).double()
    assert relative_error(evidence.grams["0.weight"][0], first.T @ first + second.T @ second) < 1e-6


def test_saved_evidence_gives_the_same_merge(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).eval()
    experts = make_experts(base)
    calibration = {name: [torch.randn(11, 5)] for name in experts}
    evidence = collect(base, experts, calibration)
    evidence.save(tmp_path / "grams.safetensors")
    loaded = GramEvidence.load(tmp_path / "grams.safetensors")
    assert loaded.provenance == evidence.provenance and loaded.experts == evidence.experts
    direct = merge("lot", base=base, experts=experts, calibration=calibration).state
    for source in (loaded, loaded, tmp_path / "grams.safetensors"):  # a merge leaves the evidence as it was
        again = merge("lot", base=base, experts=experts, evidence=source).state
        assert all(torch.equal(direct[key], again[key]) for key in direct)
    other = {**experts, "b": fine_tuned(base, 77)}
    with pytest.raises(CalibrationError, match="evidence was collected from another expert 'b'"):
        merge("lot", base=base, experts=other, evidence=loaded)
    with pytest.raises(CalibrationError, match="evidence is of the experts"):
        merge("lot", base=base, experts={"a": experts["a"]}, evidence=loaded)


def test_loading_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CalibrationError, match="expected a file of format 'statsmerge-grams-1', found None"):
        GramEvidence.load(tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="broken.safetensors"):
        GramEvidence.load(tmp_path / "broken.safetensors")


def test_bad_calibration_is_refused():
    base = nn.Linear(4, 3)
    experts = make_experts(base)
    good = {name: [torch.randn(5, 4)] for name in experts}
    for wrong, message in [
        (None, "missing \\['a', 'b', 'c'\\]"),
        ({**good, "d": [torch.randn(5, 4)]}, "not an expert \\['d'\\]"),
        ({**good, "b": []}, "calibration for 'b'"),
        ({**good, "b": iter(())}, "calibration for 'b'"),
        ({**good, "b": [(torch.randn(5, 4), torch.zeros(5))]}, "calibration for 'b', batch 0"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            merge("lot", base=base, experts=experts, calibration=wrong)


def test_changing_input_sharing_is_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.one(x) + self.two(x if x.shape[0] == 3 else x * 2)

    base = Model()
    calibration = {"a": [torch.randn(3, 4), torch.randn(2, 4)]}
    with pytest.raises(CalibrationError, match="share_inputs=False"):
        collect(base, {"a": fine_tuned(base, 1)}, calibration)
    evidence = collect(base, {"a": fine_tuned(base, 1)}, calibration, share_inputs=False)
    assert len(evidence.grams) == 2
