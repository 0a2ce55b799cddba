"""The benchmark of SmolLM2 on a tiny model: texts are split, experts trained, merged and measured."""

from __future__ import annotations

import json
import math

import pytest
import smollm2
import smollm2_experts
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = smollm2.Settings(
    tokens=12,
    steps=60,
    batch=8,
    lr=1e-2,
    validation=8,
    test=16,
    samples=16,
    followed=4,
    taught=4,
    epochs=1,
    factors={"task_arithmetic": (0.3, 0.5), "ties": (1.0,), "lot": (0.9, 1.0)},
)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=60, tie_word_embeddings=True)).eval()


def texts() -> smollm2_experts.Windows:
    """Three domains: each counts up in steps of its own, from anywhere."""
    generator = torch.Generator().manual_seed(0)
    domains = {}
    for step, domain in enumerate(smollm2_experts.DOMAINS, start=1):
        starts = torch.randint(60, (600, 1), generator=generator)
        parts = ((starts + step * torch.arange(SETTINGS.tokens)) % 60).split((552, 24, 24))
        domains[domain] = dict(zip(("train", "validation", "test"), parts, strict=True))
    return domains


def test_readers(tmp_path):
    fortunes, table = tmp_path / "usr/share/games/fortunes/de", tmp_path / "orangecontrib/text/datasets"
    fortunes.mkdir(parents=True)
    table.mkdir(parents=True)
    (fortunes / "witze").write_text("Eins\n%\nZwei\nDrei\n%\n" + "Vier\n%\n" * 19)
    (fortunes / "witze.dat").write_bytes(b"\xff")
    (fortunes / "asciiart").write_text("/\\\n%\n")
    (fortunes / "witze.u8").symlink_to("witze")
    (tmp_path / "short.py").write_text("import short\n")
    (tmp_path / "long.py").write_text("long = 1\n" * 100)
    header = ["Season & Episode\tAuthor\tQuote", "d\td\ts", "\t\t"]
    rows = [*header, "0101\tJoey\t Hi  you!", "0101\tRoss\tHi.", "0102\tJoey\tNo."]
    (table / "friends-transcripts.tab").write_text("\n".join(rows) + "\n")
    store = type("Store", (), {"path": lambda self, package: tmp_path})()
    assert smollm2_experts.german(store) == ["Eins\n\nZwei\nDrei" + "\n\nVier" * 18, "Vier"]
    assert smollm2_experts.python(store) == ["long = 1\n" * 100]
    assert smollm2_experts.friends(store) == ["Joey: Hi you!\nRoss: Hi.", "Joey: No."]


def test_documents_are_split_whole_and_once():
    documents = [f"document {i % 40}" for i in range(60)]
    parts = smollm2_experts.split(documents)
    assert sorted(text for part in parts.values() for text in part) == sorted(set(documents))
    assert [len(parts[name]) for name in ("test", "validation", "train")] == [5, 5, 30]
    assert smollm2_experts.split(documents) == parts != smollm2_experts.split(documents, seed=1)


def test_windows_are_the_running_text():
    class Letters:
        def __call__(self, documents):
            return type("Encoded", (), {"input_ids": [[ord(c) for c in text] for text in documents]})

        def convert_tokens_to_ids(self, token):
            return 0

    cut = smollm2_experts.windows(["abcd", "efghi", "j" * (smollm2_experts.BEGINNING + 5)], Letters(), 4)
    rows = sorted("".join(map(chr, row)) for row in cut.tolist())
    # The separators end both short documents; of the long one the beginning is read.
    assert rows[:2] == ["\0efg", "abcd"] and "hi\0j" in rows
    assert len(rows) == (11 + smollm2_experts.BEGINNING + 1) // 4


def test_windows_are_kept(tmp_path):
    smollm2_experts.save_windows(texts(), tmp_path)
    kept = smollm2_experts.load_windows(tmp_path)
    for domain, of_domain in texts().items():
        assert kept[domain].keys() == of_domain.keys()
        assert all(torch.equal(kept[domain][name], cut) for name, cut in of_domain.items())


def test_perplexity():
    small, tokens = model(), texts()["python"]["test"]
    exact = small.double()(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    expected = math.exp(F.cross_entropy(exact.detach(), tokens[:, 1:].flatten()))
    small = model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = math.exp(small(input_ids=tokens, labels=tokens).loss)
    measured = smollm2_experts.perplexity(small, tokens)
    assert abs(measured - expected) <= 2 * abs(plain - expected) + 1e-4 * expected


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> smollm2.Bench:
    directory = tmp_path_factory.mktemp("models")
    model().save_pretrained(directory / "base")
    bench = smollm2.Bench(directory, texts(), SETTINGS)
    bench.run()
    return bench


@pytest.fixture
def facts(bench) -> dict:
    return {"environment": smollm2.environment(), "windows": dict.fromkeys(smollm2_experts.DOMAINS), **bench.facts}


def test_a_model_a_row_is_left_and_none_is_measured_again(bench, monkeypatch):
    left = {path.name for path in bench.directory.iterdir() if path.is_dir()}
    assert left == bench.facts["rows"].keys()
    monkeypatch.setattr(smollm2, "run_merge", None)
    monkeypatch.setattr(smollm2, "fine_tune", None)
    again = smollm2.Bench(bench.directory, {}, SETTINGS).run()
    assert again["stages"] == bench.facts["stages"]
    assert again["rows"] == json.loads(json.dumps(bench.facts["rows"]))


def test_every_merge_is_measured(facts):
    rows = facts["rows"]
    expected = [
        "base",
        *smollm2_experts.DOMAINS,
        "linear",
        "task_arithmetic",
        "ties",
        "lot",
        "regmean",
        "stats_merging",
    ]
    assert list(rows) == [*expected, "drift_compensation", smollm2.STRONG]
    assert all(1 <= value < 200 for row in rows.values() for value in row["test"].values())
    for domain in smollm2_experts.DOMAINS:  # an expert knows its own domain, and none of the others
        assert rows[domain]["test"][domain] < 0.9 * rows["base"]["test"][domain]
        assert all(
            rows[domain]["test"][domain] < rows[other]["test"][domain]
            for other in smollm2_experts.DOMAINS
            if other != domain
        )
    for name in ("lot", "regmean"):
        assert rows[name]["in_memory"] is None  # block by block
    assert sum(map(math.log, rows["lot"]["test"].values())) < sum(map(math.log, rows["base"]["test"].values()))


def test_scaling_factors_are_chosen_on_validation_windows(facts):
    for method, factors in SETTINGS.factors.items():
        row = facts["rows"][method]
        assert list(row["validation"]) == list(factors)
        assert row["validation"][row["scaling_factor"]] == min(row["validation"].values())


def test_page(facts, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- perplexity -->\n<!-- /perplexity -->\n<!-- seconds -->\n<!-- /seconds -->\n")
    monkeypatch.setattr(smollm2, "PAGE", page)
    one = json.loads(json.dumps(facts))
    smollm2.report([one])
    text = page.read_text()
    for name, row in facts["rows"].items():
        line = next(line for line in text.splitlines() if line.startswith(("| " + name, f"| expert of {name}")))
        assert all(f" {value:.2f} " in line for value in row["test"].values())
    assert f"λ = {facts['rows']['lot']['scaling_factor']:g}" in text and "| all " in text
    other = json.loads(json.dumps(facts))
    domain = next(iter(smollm2_experts.DOMAINS))
    other["rows"]["lot"]["test"][domain] *= 1.02
    smollm2.report([one, other])
    line = next(line for line in page.read_text().splitlines() if line.startswith("| lot"))
    before = 100 * (facts["rows"]["lot"]["test"][domain] / facts["rows"][domain]["test"][domain] - 1)
    after = 1.02 * (100 + before) - 100
    assert f"({(before + after) / 2:+.1f} ± {(after - before) / 2:.1f} %)" in line
    assert "2 seeds" in page.read_text()


def test_one_window_a_step_is_enough():
    trained = smollm2_experts.fine_tune(model(), texts()["python"]["train"][:1], steps=3, batch=2, lr=1e-2)
    base = model().state_dict()
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, base[name])}
    assert moved == {name for name in base if "_proj." in name}
