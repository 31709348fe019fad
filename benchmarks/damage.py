"""What the training loader makes of a damaged cache: every damage is refused, or changes nothing that is trained on.

Used by `benchmarks.faults`. `read` goes the way of `pipeline train-student` up to the batches and hashes every number
a student would be trained on; `outcome` compares that with the undamaged cache.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

EXTRA = ("tail_samples", "entropy")


@dataclass(frozen=True)
class Damage:
    """files: new bytes by path inside the cache; None removes the file. kind: its row in the table."""

    kind: str
    what: str
    files: dict[str, bytes | None]


@dataclass
class Count:
    """Outcomes of one kind of damage. verified: of those that change nothing, `pipeline verify` names these."""

    tried: int = 0
    refused: int = 0
    unchanged: int = 0
    verified: int = 0
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def add(self, found: str, verified: bool, what: str) -> None:
        self.tried += 1
        self.verified += verified
        if found == "refused":
            self.refused += 1
        elif found == "unchanged":
            self.unchanged += 1
        else:
            (self.wrong if found == "wrong" else self.broken).append(f"{what}: {found}")


def files_of(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a cache that is not being written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".tmp-") for part in path.relative_to(folder).parts)
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The same; of a receipt, all but its timing."""
    found = files_of(folder)
    for name in [name for name in found if name.startswith("shards/") and name.endswith(".json")]:
        receipt = json.loads(found[name])
        receipt.pop("seconds")
        found[name] = json.dumps(receipt).encode()
    return found


def read(folder: Path, *, checksums: bool = True) -> str:
    """sha256 of every number that a student would be trained on. Raises what the loader raises.

    checksums: as `pipeline train-student` compares them before it begins.
    """
    from stages.cached_tail import make_tail, sketch_columns
    from stages.compatibility import cache_tokenizer
    from stages.held_out import split_held_out
    from stages.objective import Objective
    from stages.shard_dataset import ShardDataset, corpus_threshold, sequence_lengths
    from stages.student import open_caches

    when = "start" if checksums else "off"
    [cache] = open_caches([str(folder)], when)
    digest = hashlib.sha256()
    tokenizer = cache_tokenizer(cache)
    digest.update(repr((sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)).encode())
    tail = make_tail(Objective(name="kl", tail="prior"), [cache])
    assert tail.log_prior is not None
    digest.update(tail.log_prior.numpy().tobytes())
    extra = EXTRA
    if cache.manifest.scoring.sketch is not None:
        sketch = make_tail(Objective(name="kl", tail="sketch"), [cache]).sketch
        assert sketch is not None
        for name, value in sorted(vars(sketch).items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode())
        extra = tuple(dict.fromkeys([*EXTRA, *sketch_columns(cache)]))
    digest.update(sequence_lengths(cache).tobytes())
    train, held_out = split_held_out(cache, 0.2)
    digest.update(str(corpus_threshold([(cache, train)], 0.5)).encode())
    for ids in (train, held_out):
        dataset = ShardDataset(cache, ids, extra=extra, checksums=when)
        for index in range(len(dataset)):
            for name, value in sorted(vars(dataset[index]).items()):
                digest.update(f"{name}{np.shape(value)}".encode() + np.asarray(value).tobytes())
    return digest.hexdigest()


def verified(folder: Path) -> list[str]:
    """What `pipeline verify` says."""
    from stages.compatibility import cache_tokenizer
    from storage.cache import Cache
    from storage.errors import UserError
    from storage.integrity import problems

    try:
        cache = Cache.open(folder)
        found = list(problems(cache))
    except UserError as error:
        return [str(error)]
    try:
        cache_tokenizer(cache)
    except UserError as error:
        found.append(str(error))
    return found


def outcome(folder: Path, undamaged: str, **options: Any) -> str:
    """`refused` by one sentence of ours, `unchanged`, `wrong`, or the exception that must not have come."""
    from storage.errors import UserError

    try:
        # A warning is no refusal, and must not fill the terminal.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "unchanged" if read(folder, **options) == undamaged else "wrong"
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {error}"


def try_all(folder: Path, damages: Iterator[Damage], **options: Any) -> dict[str, Count]:
    """Counts by kind. folder: a cache that is damaged and mended again and again."""
    undamaged = read(folder)
    whole = files_of(folder)
    counts: dict[str, Count] = {}
    for damage in damages:
        for name, data in damage.files.items():
            _put(folder / name, data)
        found = outcome(folder, undamaged, **options)
        named = found == "unchanged" and bool(verified(folder))
        counts.setdefault(damage.kind, Count()).add(found, named, damage.what)
        for name in damage.files:
            _put(folder / name, whole.get(name))
    assert files_of(folder) == whole and read(folder) == undamaged
    return counts


def _put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(data)


# ---- the damages ------------------------------------------------------------------------------------------


def kind_of(name: str) -> str:
    """The row of the table that a file belongs to."""
    top, _, rest = name.partition("/")
    if top == "shards":
        return "receipts" if rest.endswith(".json") else "shards"
    return f"{top}/" if rest else top


def flips(files: dict[str, bytes], stride: Callable[[str], int], seed: int) -> Iterator[Damage]:
    """One byte of one file becomes another, at every place or every `stride`-th."""
    random = np.random.default_rng(seed)
    for name, data in files.items():
        for at in range(0, len(data), stride(name)):
            changed = bytearray(data)
            changed[at] ^= int(random.integers(1, 256))
            yield Damage(kind_of(name), f"{name}, byte {at} now {changed[at]}", {name: bytes(changed)})


def truncations(files: dict[str, bytes], stride: Callable[[str], int]) -> Iterator[Damage]:
    for name, data in files.items():
        for length in range(0, len(data), stride(name)):
            yield Damage(kind_of(name), f"{name}, {length} bytes", {name: data[:length]})


def misplaced(files: dict[str, bytes], other: dict[str, bytes], shards: int) -> Iterator[Damage]:
    """Files swapped, doubled, renamed, missing, or those of `other`, a cache of the same teacher."""

    def of(index: int) -> dict[str, str]:
        return {
            "shard": f"shards/part-{index:05d}.parquet",
            "receipt": f"shards/part-{index:05d}.json",
            "tail sum": f"tail_sums/part-{index:05d}.parquet",
        }

    groups = [("shard",), ("receipt",), ("tail sum",), ("shard", "receipt"), ("shard", "receipt", "tail sum")]
    for group in groups:
        what = ", ".join(group)
        for i in range(shards):
            for j in range(shards):
                a, b = of(i), of(j)
                if i < j:
                    swapped = {a[g]: files[b[g]] for g in group} | {b[g]: files[a[g]] for g in group}
                    yield Damage("swapped", f"{what} of {i} and {j}", swapped)
                if i != j:
                    yield Damage("doubled", f"{what} of {i} also as {j}", {b[g]: files[a[g]] for g in group})
                    renamed = {a[g]: None for g in group} | {b[g]: files[a[g]] for g in group}
                    yield Damage("renamed", f"{what} of {i} to {j}", renamed)
            yield Damage("missing", f"{what} of {i}", {of(i)[g]: None for g in group})
            yield Damage(
                "of another cache", f"{what} of {i}", {of(i)[g]: other[of(i)[g]] for g in group if of(i)[g] in other}
            )
    for name in files:
        if "/" not in name or name.startswith("tokenizer/"):
            yield Damage("missing", name, {name: None})
            if name in other and other[name] != files[name]:
                yield Damage("of another cache", name, {name: other[name]})
    prior = {name: other[name] for name in files if name.startswith("tail_prior")}
    yield Damage("of another cache", "the tail prior, all its files", prior)


def edits(files: dict[str, bytes], names: Sequence[str]) -> Iterator[Damage]:
    """Each field of a JSON file or of the header of safetensors: another value, a wrong type, nothing, and gone."""
    for name in names:
        header, rest = files[name], b""
        if tensors := name.endswith(".safetensors"):
            end = 8 + int.from_bytes(header[:8], "little")
            header, rest = header[8:end], header[end:]
        plain = json.loads(header)

        def whole(value: Any, tensors: bool = tensors, rest: bytes = rest) -> bytes:
            text = json.dumps(value).encode()
            return len(text).to_bytes(8, "little") + text + rest if tensors else text

        for path, value in _leaves(plain):
            others: list[Any] = [None, [], {}, "x", -1, 1e300]
            if isinstance(value, bool):
                others.append(not value)
            elif isinstance(value, (int, float)):
                others += [value + 1, value - 1, 0, 10**30, str(value)]
            elif isinstance(value, str):
                others += [value + "x", value[::-1], ""]
            for other in others:
                if other == value and type(other) is type(value):
                    continue
                found = whole(_edited(plain, path, other))
                yield Damage(kind_of(name), f"{name}: {'.'.join(map(str, path))} = {other!r}", {name: found})
            yield Damage(kind_of(name), f"{name}: no {path}", {name: whole(_edited(plain, path, ..., drop=True))})


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if path:
        yield path, value
    for key, item in items:
        yield from _leaves(item, (*path, key))


def _edited(plain: Any, path: Sequence[Any], value: Any, *, drop: bool = False) -> Any:
    copy = json.loads(json.dumps(plain))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copy


def total(counts: Sequence[dict[str, Count]]) -> dict[str, Count]:
    """Counts of several workers in one."""
    whole: dict[str, Count] = {}
    for part in counts:
        for kind, count in part.items():
            into = whole.setdefault(kind, Count())
            into.tried += count.tried
            into.refused += count.refused
            into.unchanged += count.unchanged
            into.verified += count.verified
            into.wrong += count.wrong
            into.broken += count.broken
    return whole
