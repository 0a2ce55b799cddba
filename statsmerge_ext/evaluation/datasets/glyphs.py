"""Letters drawn from fonts, split by font: an image data set for the price of a few font files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .packages import Package, PackageStore
from .splits import Dataset, Examples

SIDE = 64  # pixels
THAI_FAMILIES = "garuda kinnari laksaman loma mono norasi purisa sawasdee typewriter typist typo umpush waree".split()
THAI = Package("deb", tuple(f"fonts-tlwg-{family}-ttf" for family in THAI_FAMILIES))
LETTERS = Package("deb", ("fonts-aenigma",))
HEBREW = Package("deb", ("culmus", "culmus-fancy"))
ARABIC = Package("deb", ("fonts-arabeyes", "fonts-kacst"))

# The consonants ko kai to ho nokhuk without the vowel signs ru and lu that stand between them.
THAI_LETTERS = tuple(chr(code) for code in range(0x0E01, 0x0E2F) if code not in (0x0E24, 0x0E26))
LATIN_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
HEBREW_LETTERS = tuple(chr(code) for code in range(0x05D0, 0x05EB))  # the five final forms included
# Alef to yeh without the forms with hamza, teh marbuta, and what stands between ghain and feh.
ARABIC_LETTERS = tuple(chr(code) for code in (0x0627, 0x0628, *range(0x062A, 0x063B), *range(0x0641, 0x0649), 0x064A))


def draw(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray | None:
    """uint8 [SIDE, SIDE], black on white, the letter 44 pixels high and centred; None when the font draws nothing."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = right - left, bottom - top
    if width <= 0 or height <= 0:
        return None
    image = Image.new("L", (width, height), 255)
    ImageDraw.Draw(image).text((-left, -top), letter, font=font, fill=0)
    scale = 44 / max(width, height)
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (SIDE, SIDE), 255)
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas)


def draw_fonts(paths: list[Path], letters: tuple[str, ...], families: list[str]) -> Examples:
    """One image a font and letter. Fonts that miss a letter or draw two letters alike (symbol fonts) are left out."""
    images, labels, groups = [], [], []
    for path, family in zip(paths, families, strict=True):
        try:
            font = ImageFont.truetype(str(path), 64)
            drawn = [draw(font, letter) for letter in letters]
        except OSError:  # a few of the decorative fonts are damaged
            continue
        if any(image is None for image in drawn) or len({image.tobytes() for image in drawn}) < len(letters):
            continue
        images += drawn
        labels += range(len(letters))
        groups += [family] * len(letters)
    return Examples(np.stack(images), np.array(labels), letters, np.array(groups))


def load_thai(store: PackageStore) -> Examples:
    """The 44 Thai consonants in 13 font families, each with its bold and slanted faces; a family is a group."""
    paths = sorted(store.path(THAI).rglob("*.ttf"))
    return draw_fonts(paths, THAI_LETTERS, [path.stem.split("-")[0] for path in paths])


def load_letters(store: PackageStore) -> Examples:
    """The capitals A to Z in about 450 decorative fonts; fonts whose file names begin alike are a group."""
    paths = sorted(store.path(LETTERS).rglob("*.ttf"))
    return draw_fonts(paths, LATIN_LETTERS, [re.sub(r"\W", "", path.stem.lower())[:5] for path in paths])


def load_hebrew(store: PackageStore) -> Examples:
    """The 22 Hebrew letters and five final forms in some forty families, with their faces; a family is a group."""
    paths = sorted(path for path in store.path(HEBREW).rglob("*") if path.suffix in (".ttf", ".otf", ".pfa"))
    return draw_fonts(paths, HEBREW_LETTERS, [path.stem.split("-")[0] for path in paths])


def load_arabic(store: PackageStore) -> Examples:
    """The 28 Arabic letters in some fifty fonts, each with its bold face; a family is a group."""
    paths = sorted(store.path(ARABIC).rglob("*.ttf"))
    return draw_fonts(paths, ARABIC_LETTERS, [path.stem.split("-")[0] for path in paths])


thai = Dataset("thai", (THAI,), load_thai)
letters = Dataset("letters", (LETTERS,), load_letters)
hebrew = Dataset("hebrew", (HEBREW,), load_hebrew)
arabic = Dataset("arabic", (ARABIC,), load_arabic)
