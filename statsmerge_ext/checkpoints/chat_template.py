"""The chat templates of model directories, and a directory's tokenizer files with another one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from statsmerge_ext.checkpoints.reading import read_json
from statsmerge_ext.errors import CheckpointError

FILE, CONFIG, KEY = "chat_template.jinja", "tokenizer_config.json", "chat_template"


def most_common_chat_template(directories: Iterable[Path]) -> str | None:
    """The chat template that most of the models have, of equally many the first; None if none has one.

    Raises CheckpointError for a file that cannot be read.
    """
    found = Counter(template for template in map(_chat_template, directories) if template is not None)
    return found.most_common(1)[0][0] if found else None


def with_chat_template(template: str, tokenizer: Path) -> dict[str, str]:
    """Name → text of those of a tokenizer's files that say its chat template, with ``template`` in its place.

    Raises CheckpointError for a file that cannot be read.
    """
    files = {FILE: template}
    if (tokenizer / CONFIG).exists() and KEY in (config := read_json(tokenizer / CONFIG)):
        files[CONFIG] = json.dumps({**config, KEY: template}, indent=2, ensure_ascii=False) + "\n"
    return files


def _chat_template(directory: Path) -> str | None:
    """A file of its own goes before an entry in the tokenizer's configuration, as in transformers."""
    if (directory / FILE).exists():
        try:
            return (directory / FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{directory / FILE}: cannot be read: {error}") from error
    template = read_json(directory / CONFIG).get(KEY) if (directory / CONFIG).exists() else None
    if isinstance(template, list):  # several, with names
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
