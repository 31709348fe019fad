"""Choose the data files of a folder: those that `datasets.load_dataset` would take for the split that is asked for.

What is passed over is said, in notes; what cannot be told is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.splits import DEFAULT_SPLIT, find_splits
from stages.text_files import TEXT_ENDINGS
from storage.errors import UserError
from storage.places import place
from storage.words import listed_briefly

ENDINGS = (*TEXT_ENDINGS, ".parquet")
# Named in messages; each but Parquet may end in .gz or .zst, too.
_KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv, .txt (also with .gz or .zst), .parquet"

# Files about the data, and those that writers and `datasets` leave beside it.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|contributing)(\.(md|txt|rst|html|cff))?|.*\.md|"
    r"dataset_infos?\.json|dataset_dict\.json|config\.json|_success|_(common_)?metadata|_(started|committed)_\d+",
    re.IGNORECASE,
)
_SHOWN = 5


@dataclass(frozen=True)
class LocalFiles:
    """The data files of one split, sorted by path, and sentences on what was passed over."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def ending_of(path: Path) -> str | None:
    """Return which of ENDINGS the name has, or None."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def find_files(path: Path, split: str | None) -> LocalFiles:
    """Return the file itself, or the data files of a folder's split, `train` by default.

    Raises UserError (no such split, an ending that is not supported, a link that leads nowhere, no files).
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} is a pipe or device, not a file; write the rows to a file and give that.")
        if ending_of(path) is None:
            raise UserError(f"{path} has an ending that is not supported; give a file that ends in one of: {_KNOWN}.")
        _refuse_split(path, split)
        return LocalFiles((path,))
    found, passed = _walk(path)
    refuse_outside(path, found)
    twice = _links_to_others(path, found)
    found = [file for file in found if file not in twice]
    if not found:
        raise UserError(f"The folder {path} has no data files; it needs files that end in one of: {_KNOWN}.")
    wanted = split or DEFAULT_SPLIT
    by_split = find_splits(path, [file.relative_to(path).as_posix() for file in found], wanted)
    if wanted not in by_split:
        raise UserError(f"{path} has no split '{wanted}'; choose one of: {listed_briefly(by_split) or 'none'}.")
    splits = {name: {path / file for file in files} for name, files in by_split.items()}
    files = [file for file in found if file in splits[wanted]]
    for file in files:
        if ending_of(file) is None:
            raise UserError(
                f"{file} has an ending that is not supported; move it out of the folder, or convert it to "
                f"one of: {_KNOWN}."
            )
    kinds = {
        f"not used, of split {name}": [f for f in found if f in own - splits[wanted]] for name, own in splits.items()
    }
    kinds |= {
        "not used, of no split": [file for file in found if not any(file in own for own in splits.values())],
        "passed over": passed,
        "passed over, as links to files that are read": sorted(twice),
    }
    return LocalFiles(tuple(files), tuple(f"{kind}: {_listed(path, own)}" for kind, own in kinds.items() if own))


def check_apart(source: str, output: str, what: str = "data set", *, may_hold: bool = False) -> None:
    """Raise UserError where a local output lies in the folder of its source, or the source in that of the output.

    what: names the source, which may also be a file, a URL, or a name on the hub. may_hold: the source may lie in the
    folder of the output.
    """
    read, written = _local(source), _local(output)
    if read is None or written is None or not read.exists():
        return
    if written == read or read in written.parents:
        lies = "is" if written == read else "lies inside"
        raise UserError(
            f"The output {output} {lies} the {what} {source}, so its files would be read as those of the {what}; "
            "name an output elsewhere."
        )
    if written in read.parents and not may_hold:
        raise UserError(f"The {what} {source} lies inside the output {output}; name an output elsewhere.")


def _local(where: str) -> Path | None:
    """The real path of what is named; None for a URL of another machine."""
    if "://" in where:
        named = place(where) if where.startswith(("file://", "local://")) else None
        return Path(os.path.realpath(named)) if isinstance(named, Path) else None
    return Path(os.path.realpath(os.path.expanduser(where)))


# ---- what lies in a folder --------------------------------------------------------------------------------


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """All data files sorted by path, linked folders followed, and what was passed over because of its name.

    Raises UserError for links that lead nowhere or in a circle, and for what is neither file nor folder.
    """
    found: list[Path] = []
    passed: list[Path] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}.") from error

    for reached, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(reached)
        if (
            here != folder
            and here.is_symlink()
            and any(os.path.samefile(here, above) for above in _above(here, folder))
        ):
            raise UserError(f"{here} is a link back to a folder that it lies in; remove it.")
        hidden = [name for name in folders if name.startswith((".", "__"))]
        passed += [here / name for name in hidden]
        folders[:] = [name for name in folders if name not in hidden]
        for name in files:
            file = here / name
            if name.startswith(".") or _ABOUT.fullmatch(name):
                passed.append(file)
                continue
            if not file.exists():
                raise UserError(f"{file} is a link to {os.readlink(file)}, which is not there; mend or remove it.")
            if not file.is_file():
                raise UserError(f"{file} is a pipe or device, not a file; move it out of the folder.")
            found.append(file)
    return sorted(found), sorted(passed)


def _above(here: Path, folder: Path) -> Iterable[Path]:
    """`folder` and the folders between it and `here`."""
    return [folder, *(above for above in here.parents if folder in above.parents)]


def _links_to_others(folder: Path, found: Iterable[Path]) -> set[Path]:
    """The files that are reached through a link although they lie in the folder, too: they would be read twice.

    Two names of one file elsewhere stay: so the Hub's cache keeps two files of the same content.
    """
    own = {Path(os.path.realpath(file)): file for file in found if _below(folder, file)}
    return {file for file in found if not _below(folder, file) and Path(os.path.realpath(file)) in own}


def _below(folder: Path, file: Path) -> bool:
    """True where no link leads from the folder to the file."""
    return Path(os.path.realpath(file)) == Path(os.path.realpath(folder)) / file.relative_to(folder)


def refuse_outside(folder: Path, files: Iterable[Path]) -> None:
    """Raise UserError for a file of a folder that is reached through a link out of it.

    A folder may be somebody else's, and such a link may lead to any file of this machine. The Hub's cache is made of
    links: its snapshots' files lie in `blobs` beside them, in the folder of the same repository.
    """
    real = Path(os.path.realpath(folder))
    for file in files:
        target = Path(os.path.realpath(file))
        of_the_hub = target.parent.name == "blobs" and target.parent.parent in real.parents
        if real not in target.parents and not of_the_hub:
            raise UserError(
                f"{file} is a link out of the folder, to {target}; put the file itself in its place, or give its path."
            )


def _refuse_split(path: Path, split: str | None) -> None:
    if split not in (None, DEFAULT_SPLIT):
        raise UserError(f"{path} has no split '{split}'; choose one of: train (the only split of a file).")


def _listed(folder: Path, files: Sequence[Path]) -> str:
    """Some of the names, below the folder, and how many more there are."""
    names = [file.relative_to(folder).as_posix() for file in files[:_SHOWN]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
