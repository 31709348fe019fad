"""Which files of a folder make up which split, as `datasets.load_dataset` finds them: by its card, else by names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from storage.errors import UserError

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


def find_splits(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return which of the files `names`, paths below the folder, make up each split.

    A card (`README.md`) that names data files decides; else names do. Raises UserError for a card of several data sets
    none of which is the default.
    """
    config = _config(folder)
    files = config.get("data_files")
    within = str(PurePosixPath(str(config.get("data_dir") or ".")))
    prefix = "" if within == "." else f"{within}/"
    if not files:
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return {split: [prefix + name for name in own] for split, own in splits_by_name(below).items()}
    by_split = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    listed = by_split or [{"split": DEFAULT_SPLIT, "path": files}]
    found = {}
    for entry in listed:
        paths = entry.get("path")
        patterns = [_glob(prefix + str(path)) for path in (paths if isinstance(paths, list) else [paths])]
        found[str(entry.get("split"))] = [name for name in names if any(p.fullmatch(name) for p in patterns)]
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
    import yaml

    try:
        with (folder / CARD).open(encoding="utf-8", errors="replace") as file:
            head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", file.read(_MOST_CARD_BYTES), re.DOTALL)
        data = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    configs = data.get("configs") if isinstance(data, dict) else None
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    if len(configs) < 2:
        return configs[0] if configs else {}
    named = [str(config.get("config_name")) for config in configs]
    for config, name in zip(configs, named, strict=True):
        if config.get("default") is True or name == "default":
            return config
    raise UserError(
        f"The card of {folder} names several data sets ({', '.join(named)}); give the files or the folder of one."
    )


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` within a name, `**` over folders, as in a card."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", str(PurePosixPath(pattern)))
    return re.compile(
        "".join(words.get(part, part if part.startswith("[") else re.escape(part)) for part in parts), re.DOTALL
    )
