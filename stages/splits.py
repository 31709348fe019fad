"""Find the files of each split of a folder, as `datasets.load_dataset` does: by its card, else by names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from stages.glob_pattern import GlobPattern
from stages.rows import first_line
from storage.errors import UserError
from storage.words import listed_briefly

DEFAULT_SPLIT = "train"
CARD = "README.md"

# The words for splits in paths.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BESIDE = "[-._ 0-9]"
_SHARDED = re.compile(r"data/([^/]*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_MOST_CARD_BYTES = 1 << 20
_HEAD = re.compile(r"(\s*---\n)(.*?)\n---[ \t]*(\n|$)", re.DOTALL)


def find_splits(folder: Path, names: Sequence[str], wanted: str = DEFAULT_SPLIT) -> dict[str, list[str]]:
    """Return which of the files `names`, paths below the folder, make up each split.

    A card (`README.md`) that names data files decides; else names do. Raises UserError for a card that cannot be read,
    one of several data sets none of which is the default, and files of the split `wanted` that it names in vain.
    """
    config = _config(folder)
    files = config.get("data_files")
    within = str(PurePosixPath(_word(config.get("data_dir") or ".", "data_dir", folder)))
    prefix = "" if within == "." else f"{within}/"
    if not files:
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return {split: [prefix + name for name in own] for split, own in splits_by_name(below).items()}
    by_split = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    listed = by_split or [{"split": DEFAULT_SPLIT, "path": files}]
    found = {}
    for entry in listed:
        split, paths = _word(entry.get("split"), "split", folder), entry.get("path")
        words = [_word(path, "path", folder) for path in (paths if isinstance(paths, list) else [paths])]
        by_pattern = {word: {*filter(_glob(prefix + word, folder).matches, names)} for word in words}
        found[split] = [name for name in names if any(name in own for own in by_pattern.values())]
        missing = [word for word, own in by_pattern.items() if not own]
        if missing and split == wanted:
            raise UserError(
                f"{folder / CARD} names data files that are not there ({listed_briefly(missing)}); mend or remove the "
                "card."
            )
    return {split: own for split, own in found.items() if own}


def splits_by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split by their names alone.

    Shards like `data/train-00000-of-00001.parquet` count before folders named after splits, those before file names,
    and where nothing is named so all files are `train`. A file may be of two splits, or of none.
    """
    sharded: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARDED.fullmatch(name):
            sharded.setdefault(match[1], []).append(name)
    if sharded:
        first = [split for split in _WORDS if split in sharded]
        return {split: sharded[split] for split in [*first, *sorted(set(sharded) - set(first))]}
    for of_folders in (True, False):
        found = {}
        for split, words in _WORDS.items():
            # The name of a folder may end with the word; after it in a file's name comes at least the ending.
            after = f"({_BESIDE}.*)?" if of_folders else f"{_BESIDE}.*"
            pattern = re.compile(f"(.*{_BESIDE})?({'|'.join(words)}){after}", re.DOTALL)
            parts = {name: PurePosixPath(name).parts for name in names}
            own = [
                name
                for name in names
                if any(map(pattern.fullmatch, parts[name][:-1] if of_folders else parts[name][-1:]))
            ]
            if own:
                found[split] = own
        if found:
            return found
    return {DEFAULT_SPLIT: list(names)}


def _config(folder: Path) -> dict[str, Any]:
    """The default data set of those that the folder's card names, empty where it names none."""
    data = _head(folder / CARD)
    configs = data.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    if len(configs) < 2:
        return configs[0] if configs else {}
    named = [_word(config.get("config_name"), "config_name", folder) for config in configs]
    for config, name in zip(configs, named, strict=True):
        if config.get("default") is True or name == "default":
            return config
    raise UserError(
        f"The card of {folder} names several data sets ({listed_briefly(named)}); give the files or the folder of one."
    )


def _word(value: Any, field: str, folder: Path) -> str:
    """The value as text. Raises UserError for what is neither a word nor a number, and not shown: it may be endless."""
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"{folder / CARD}: {field} is no text; mend or remove the card.")
    return str(value)


def _head(card: Path) -> dict[str, Any]:
    """The YAML between the two lines of `---` that a card may begin with, empty without. Raises UserError."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Without merges: a few of them stand for more than a machine can hold."""

    try:
        # A byte order mark is no text.
        with card.open(encoding="utf-8-sig", errors="replace") as file:
            head = _HEAD.match(file.read(_MOST_CARD_BYTES))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{card} cannot be read: {error.strerror or error}.") from error
    if head is None:
        return {}
    try:
        data = yaml.load(head[2], Loader)
    # What tags make of values that they do not fit raises errors of every kind.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {head[1].count(chr(10)) + mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(
            f"{card}{line}: the YAML between the lines of --- cannot be read ({reason}); mend or remove it."
        ) from error
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{card}: the YAML between the lines of --- has no keys; mend or remove it.")
    return data or {}


def _glob(pattern: str, folder: Path) -> GlobPattern:
    """A pattern of a card. Raises UserError for one that cannot be read."""
    try:
        return GlobPattern(str(PurePosixPath(pattern)))
    except re.error as error:
        raise UserError(
            f"{folder / CARD} names files by a pattern that cannot be read ({pattern[:100]}); mend it."
        ) from error
