"""Readers of data sets: formats, what they keep of a text, and code that they refuse to run."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from statsmerge_ext.errors import DataError
from statsmerge_ext.evaluation.datasets import drawings, images, texts
from statsmerge_ext.evaluation.datasets.glyphs import ARABIC_LETTERS, HEBREW_LETTERS, THAI_LETTERS, draw_fonts


class FolderStore:
    """A store whose packages are all one folder."""

    def __init__(self, root):
        self.root = root

    def path(self, package):
        return self.root


def write_animals(root, data, labels):
    for part, content in (("data", data), ("label", labels)):
        (root / f"animal_{part}_version_3.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickled_arrays_are_read(tmp_path, protocol):
    data, labels = np.arange(4 * 784, dtype=np.uint8).reshape(4, 784), np.array([3, 1, 0, 2])
    write_animals(tmp_path, pickle.dumps(data, protocol=protocol), pickle.dumps(labels, protocol=protocol))
    examples = images.load_animal(FolderStore(tmp_path))
    assert np.array_equal(examples.inputs, data.reshape(4, 28, 28)) and np.array_equal(examples.labels, labels)


class Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {
    "os": lambda trace: (os.system, f"touch {trace}"),
    "builtins": lambda trace: (eval, f"open({str(trace)!r}, 'w')"),
    "numpy": lambda trace: (np.save, str(trace), 0),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_pickled_code_is_refused(tmp_path, name, protocol):
    trace = tmp_path / "executed"
    exploit = Exploit(*CALLS[name](trace))
    write_animals(tmp_path, pickle.dumps(exploit, protocol=protocol), pickle.dumps(np.zeros(1)))
    with pytest.raises(DataError, match="refused to unpickle"):
        images.load_animal(FolderStore(tmp_path))
    assert not trace.exists()


def test_idx_files(tmp_path):
    sizes = {"train": 6, "t10k": 4}
    for part, count in sizes.items():
        pixels = np.full((count, 2, 3), count, np.uint8)
        head = struct.pack(">BBBB3i", 0, 0, 8, 3, *pixels.shape)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        labels = struct.pack(">BBBBi", 0, 0, 8, 1, count) + bytes(range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    examples = images.load_fashion(FolderStore(tmp_path))
    assert examples.inputs.shape == (10, 2, 3) and examples.inputs[:, 0, 0].tolist() == [6] * 6 + [4] * 4
    assert examples.labels.tolist() == [*range(6), *range(4)] and examples.test.tolist() == [False] * 6 + [True] * 4


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_that_must_be_the_only_one(tmp_path, count):
    for i in range(count):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "labels.csv").touch()
    with pytest.raises(DataError, match=f"expected one file 'labels.csv', found {count}"):
        images.find_one(tmp_path, "labels.csv")


def test_fonts_that_are_damaged_or_draw_all_letters_alike_are_left_out(tmp_path):
    good = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    examples = draw_fonts([damaged, good], ("A", "B", "Q"), ["none", "dejavu"])
    assert examples.inputs.shape == (3, 64, 64) and examples.labels.tolist() == [0, 1, 2]
    assert examples.groups.tolist() == ["dejavu"] * 3
    rows, columns = np.nonzero(examples.inputs[0] < 128)
    assert max(np.ptp(rows), np.ptp(columns)) in range(41, 44)  # 44 pixels, but for soft edges
    with pytest.raises(ValueError, match="at least one array"):  # no font is left: what it lacks looks all alike
        draw_fonts([good], ("\U000e0001", "\U000e0002"), ["dejavu"])


def test_alphabets():
    assert [len(set(letters)) for letters in (THAI_LETTERS, HEBREW_LETTERS, ARABIC_LETTERS)] == [44, 27, 28]
    assert all(unicodedata.category(letter) == "Lo" for letter in THAI_LETTERS + HEBREW_LETTERS + ARABIC_LETTERS)


def test_drawings_of_one_thing_stay_together(tmp_path):
    root = tmp_path / "game" / "core" / "images" / "units"
    names = ("drakes/fire-bow-2.png", "drakes/fire.png", "drakes/gunslinger+female-1.png", "orcs/mounted/fire.png")
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (72, 72), (50 * shade, 0, 0, 255)).save(path)
    Image.new("RGBA", (72, 72), (0, 0, 0, 0)).save(root / "drakes" / "ghost.png")  # transparent: becomes white
    examples = drawings.load_drawings(FolderStore(tmp_path), "units", ["drakes", "orcs"], words=1)
    assert examples.inputs.shape == (5, 64, 64, 3)
    assert examples.inputs[:, 0, 0].tolist() == [[0, 0, 0], [50, 0, 0], [255] * 3, [100, 0, 0], [150, 0, 0]]
    assert examples.labels.tolist() == [0, 0, 0, 0, 1]
    things = ["drakes/fire", "drakes/fire", "drakes/ghost", "drakes/gunslinger", "orcs/mounted/fire"]
    assert examples.groups.tolist() == things


def write_tab(root, name, header, *rows):
    path = root / "orangecontrib" / "text" / "datasets" / f"{name}.tab"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, ["string"] * len(header), ["meta"] * len(header), *rows]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def test_tweets_do_not_betray_their_author(tmp_path):
    text = "RT @realDonaldTrump: Thank you   Ohio &amp; all of @HillaryClinton https://t.co/x1 via @nytimes friends"
    header = ["Author", "Content", "Time", "Is retweet"]
    write_tab(
        tmp_path,
        "election-tweets-2016",
        header,
        ["HillaryClinton", text, "2016-01-02 10:00", "False"],
        ["HillaryClinton", "one two three four five", "2016-01-02 11:00", "True"],
        ["realDonaldTrump", "too few words", "2016-01-03 10:00", "False"],
        ["someone", "four words of another", "2016-01-03 10:00", "False"],
        ["realDonaldTrump", "word " * 200, "2016-01-04 10:00", "False"],
    )
    examples = texts.load_election(FolderStore(tmp_path))
    assert examples.inputs[0] == "Thank you Ohio & all of friends"
    assert len(examples.inputs) == 2 and len(examples.inputs[1]) == texts.MAX_CHARACTERS
    assert examples.labels.tolist() == [0, 1] and examples.groups.tolist() == ["2016-01-02", "2016-01-04"]


def test_posts_do_not_betray_whom_they_quote(tmp_path):
    body = "the encryption chip is a bad idea for all of us i think"
    for part in ("train", "test"):
        write_tab(
            tmp_path,
            f"20newsgroups-{part}",
            ["Category", "Text"],
            ["sci.crypt", f"re {part} key escrow in article qrk netcom com david writes {body}"],
        )
    examples = texts.load_newsgroups(FolderStore(tmp_path))
    assert examples.inputs.tolist() == [f"{part} key escrow {body}" for part in ("train", "test")]
    assert examples.groups.tolist() == ["train key escrow the", "test key escrow the"]


def test_fortunes_lose_their_authors_and_stay_with_their_neighbours(tmp_path):
    root = tmp_path / "usr" / "share" / "games" / "fortunes"
    root.mkdir(parents=True)
    for name in texts.TOPICS:
        sayings = [f"{name} saying number {i} of\nten words or so\n\t\t-- Somebody, in {name}\n" for i in range(6)]
        (root / name).write_text("%\n".join(sayings), encoding="utf-8")
    examples = texts.load_fortunes_topic(FolderStore(tmp_path))
    assert examples.inputs[1] == "art saying number 1 of ten words or so"
    assert not any("Somebody" in text for text in examples.inputs)
    assert np.bincount(examples.labels).tolist() == [6] * len(texts.TOPICS)
    assert examples.groups[:6].tolist() == ["art art 0"] * 4 + ["art art 1"] * 2
