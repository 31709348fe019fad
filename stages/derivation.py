"""Caches made from caches, without the teacher: `pipeline select` keeps less of one, `pipeline merge` joins several.

A derived cache is planned before anything is written: which rows of which shards become which new shard. Then it is a
cache like any other: shards appear one by one with their receipts, the same command goes on where it was stopped, and
the card seals it. Its manifest names the caches it came from, which is part of its identity: a sequence keeps its
tokens, but its number is counted anew.

A new shard is what is left of one or several shards that follow one another, so no shard is read twice and the summed
tails of whole shards add up. Where only some rows of a shard are taken its summed tail cannot be known, and the
derived cache has no tail prior.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.card import card
from stages.corpus import CorpusFingerprint
from stages.summary import Summary, summarize
from stages.together import differences
from storage import schema
from storage.cache import Cache
from storage.errors import CacheError, UserError
from storage.manifest import CorpusIdentity, Manifest, Origin, PlannedShard, ScoringOptions, checked
from storage.places import place
from storage.reencoding import reencode
from storage.rows import Rows
from storage.shard import value_problems
from storage.words import counted

# Columns that stay true when entries leave the kept set, or can be made so.
_REENCODED = {column.name for column in schema.columns(tail_samples=1)}


@dataclass(frozen=True)
class Selection:
    """What to keep of a cache; None: all, or as it is there.

    first, stop: sequence ids, stop excluded. min_loss_share: sequences with a smaller share of their positions under
    the loss mask are left out. drop: names of optional columns. The rest as in ScoringOptions.
    """

    first: int = 0
    stop: int | None = None
    min_loss_share: float = 0.0
    top_n: int | None = None
    tail_epsilon: float | None = None
    min_n: int | None = None
    logprob_bits: int | None = None
    tail_samples: int | None = None
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Rows of one shard of one source; rows None: all of them."""

    source: int
    shard: int
    rows: np.ndarray | None
    tokens: int


@dataclass(frozen=True)
class Derivation:
    """A planned cache. parts: of each of its shards. has_prior: whether its summed tails can be known. source_rows:
    int64 `[S]`, as `Corpus.source_rows`.
    """

    manifest: Manifest
    sources: tuple[Cache, ...]
    parts: tuple[tuple[Piece, ...], ...]
    has_prior: bool
    source_rows: np.ndarray | None


def plan_selection(source: Cache, selection: Selection) -> Derivation:
    """Reads ids and loss masks. Raises UserError or CacheError for what cannot be done, with nothing written."""
    total = source.manifest.corpus.sequences
    stop = total if selection.stop is None else min(selection.stop, total)
    if not 0 <= selection.first < stop:
        raise UserError(
            f"--sequences: {source.path} holds {counted(total, 'sequence')}, from 0, and none in this range"
        )
    chosen = Selection(**{**selection.__dict__, "stop": stop})
    return _plan((source,), scoring_of(source, selection), chosen, {"command": "select"})


def plan_merge(sources: Sequence[Cache]) -> Derivation:
    """Raises CacheError, naming what differs, for caches that one manifest cannot describe."""
    first = sources[0]
    if len(sources) < 2:
        raise UserError("merge wants at least two caches")
    for number, source in enumerate(sources):
        for earlier in sources[:number]:
            if earlier.manifest.cache_id == source.manifest.cache_id:
                if set(earlier.shards_here) & set(source.shards_here):
                    raise CacheError(
                        f"{source.path}: is the same cache as {earlier.path}, and both hold the same shards"
                    )
            elif differing := differences(earlier, source):
                raise CacheError(
                    f"{source.path}: cannot be merged with {earlier.path}, which has another {', '.join(differing)}"
                )
        ours, theirs = (_comparable(cache.manifest.scoring) for cache in (source, first))
        if differing := [f"{name} ({ours[name]}, not {theirs[name]})" for name in ours if ours[name] != theirs[name]]:
            raise CacheError(
                f"{source.path}: keeps other things than {first.path}: {', '.join(differing[:4])}; bring both to the "
                "smaller options with `pipeline select`, or train from both as they are with two --shards"
            )
    lengths = [source.manifest.scoring.max_length for source in sources]
    scoring = first.manifest.scoring.model_copy(update={"max_length": max(lengths)})
    return _plan(tuple(sources), scoring, Selection(), {"command": "merge"})


def write(
    derivation: Derivation, output: str, progress: Callable[[int], None] = lambda tokens: None
) -> tuple[Cache, Summary]:
    """Work off what is pending at `output`, and seal. Raises CacheError for a damaged source."""
    manifest = derivation.manifest
    for source in derivation.sources:
        if place(output).resolve() == source.path.resolve():
            raise UserError(f"{output}: is the cache that is read; name a new directory")
    cache = Cache.create_or_resume(output, manifest)
    cache.write_tokenizer(derivation.sources[0].copy_tokenizer)
    if manifest.scoring.sketch is not None:
        cache.write_sketch(derivation.sources[0].sketch_bytes())
    made = False
    for index, pieces in enumerate(derivation.parts):
        if not cache.is_done(index):
            started = time.monotonic()
            rows, tail_sum = _derived_shard(derivation, index, pieces)
            seconds = time.monotonic() - started
            cache.write_shard(index, rows, tail_sum, seconds, _sketch_kl(derivation, pieces))
            made = True
        progress(manifest.shards[index].tokens)
    summary = summarize(cache)
    if made or not cache.is_sealed or cache.lacks_tail_prior:
        cache.seal(card(cache, summary))
    return cache, summary


def scoring_of(source: Cache, selection: Selection) -> ScoringOptions:
    """The options of the selected cache. Raises UserError, by name, for what the source cannot give."""
    old = source.manifest.scoring
    new: dict[str, Any] = old.model_dump()
    for name, option in [("top_n", "--top-n"), ("logprob_bits", "--logprob-bits"), ("tail_samples", "--tail-samples")]:
        asked = getattr(selection, name)
        if asked is None:
            continue
        if asked > getattr(old, name):
            raise UserError(f"{option} {asked}: {source.path} holds {getattr(old, name)}; more needs the teacher")
        new[name] = asked
    if selection.tail_epsilon is not None:
        if selection.tail_epsilon < old.tail_epsilon:
            raise UserError(
                f"--tail-epsilon {selection.tail_epsilon:g}: {source.path} stopped at {old.tail_epsilon:g}; keeping "
                "more needs the teacher"
            )
        new["tail_epsilon"] = selection.tail_epsilon
    if selection.min_n is not None:
        if not new["tail_epsilon"]:
            raise UserError(f"--min-n {selection.min_n}: belongs to --tail-epsilon, which is not given")
        if old.tail_epsilon and selection.min_n > old.min_n:
            raise UserError(
                f"--min-n {selection.min_n}: {source.path} holds at least {old.min_n}; more needs the teacher"
            )
        if selection.min_n > new["top_n"]:
            raise UserError(f"--min-n {selection.min_n}: is above --top-n {new['top_n']}")
        new["min_n"] = selection.min_n
    new["min_n"] = min(new["min_n"], new["top_n"])
    for name in selection.drop:
        temperature = schema.column_temperature(name)
        if name == "tail_samples" and old.tail_samples:
            new["tail_samples"] = 0
        elif name == schema.SKETCH_CODES.name and old.sketch is not None:
            new["sketch"] = None
        elif name == "entropy" and old.entropy:
            new["entropy"] = False
        elif temperature in old.temperatures:
            new["temperatures"] = tuple(t for t in new["temperatures"] if t != temperature)
        else:
            droppable = [name for name in ("tail_samples", "entropy") if getattr(old, name)]
            droppable += [schema.SKETCH_CODES.name] * (old.sketch is not None)
            droppable += [schema.temperature_column(t).name for t in old.temperatures]
            raise UserError(f"--drop {name}: {source.path} can do without {', '.join(droppable) or 'no column'}")
    scoring = checked(ScoringOptions, **new)
    fewer = (scoring.top_n, scoring.tail_epsilon, scoring.min_n) != (old.top_n, old.tail_epsilon, old.min_n)
    fixed = [c.name for c in scoring.columns if c.name not in _REENCODED and schema.column_temperature(c.name) is None]
    if fewer and fixed:
        raise UserError(
            f"{source.path}: {', '.join(fixed)} stand for the tail of these entries; to keep fewer of them, leave the "
            f"sketch out with --drop {schema.SKETCH_CODES.name}"
        )
    return scoring


def _comparable(scoring: ScoringOptions) -> dict[str, Any]:
    """What caches to be merged must have in common."""
    found = scoring.model_dump()
    del found["max_length"]
    if not scoring.tail_samples:
        del found["seed"]
    return found


def _plan(
    sources: tuple[Cache, ...], scoring: ScoringOptions, selection: Selection, source_info: dict[str, Any]
) -> Derivation:
    fingerprint = CorpusFingerprint()
    pieces: list[Piece] = []
    lengths: dict[int, int] = {}  # of pieces, in sequences
    origins = []
    rows_of_data: list[np.ndarray] = []
    ids = [source.manifest.cache_id for source in sources]
    for number, source in enumerate(sources):
        # Of several parts of one cache, a row may have sequences in two.
        known_rows, same_data = source.manifest.corpus.source_rows is not None, ids.index(source.manifest.cache_id)
        read = ("sequence_id", "input_ids", "loss_mask", *(["source_row"] if known_rows else []))
        source.receipts(partial=True)
        taken = 0
        for shard, rows in zip(source.shards_here, source.column(*read), strict=True):
            wanted = _wanted(rows, selection)
            if not wanted.any():
                continue
            kept = rows if wanted.all() else rows.take(np.flatnonzero(wanted))
            fingerprint.add(kept["input_ids"].lengths, kept["input_ids"].values, kept["loss_mask"].values)
            # Without rows of their own, sequences are rows.
            row = kept.sequence_id if kept.source_row is None else kept.source_row
            rows_of_data.append(np.stack([np.full(len(kept), same_data), row], 1))
            lengths[len(pieces)] = len(kept)
            pieces.append(Piece(number, shard, None if kept is rows else np.flatnonzero(wanted), kept.tokens))
            taken += len(kept)
        if not taken and len(sources) == 1:
            raise UserError(f"{source.path}: no sequence is left; ask for less")
        origins.append(
            Origin(
                cache_id=source.manifest.cache_id,
                sequences=taken,
                first=selection.first,
                stop=source.manifest.corpus.sequences if selection.stop is None else selection.stop,
                min_loss_share=selection.min_loss_share,
                shards=tuple(source.shards_here) if source.is_partial else None,
            )
        )
    source_rows = _numbered(np.concatenate(rows_of_data))
    fingerprint.add_source_rows(source_rows)
    parts = list(_grouped(pieces, max(shard.tokens for source in sources for shard in source.manifest.shards)))
    planned, first = [], 0
    for part in parts:
        sequences = sum(lengths[index] for index in part)
        planned.append(PlannedShard(first=first, sequences=sequences, tokens=sum(pieces[i].tokens for i in part)))
        first += sequences
    manifests = [source.manifest for source in sources]
    known = {
        name: next((v for m in manifests if (v := getattr(m.teacher, name)) is not None), None)
        for name in ("revision", "weights")
    }
    datasets = list(dict.fromkeys(str(m.source.get("dataset", "unknown")) for m in manifests))
    manifest = Manifest(
        teacher=manifests[0].teacher.model_copy(update=known),
        tokenizer=manifests[0].tokenizer,
        vocabulary_size=manifests[0].vocabulary_size,
        corpus=CorpusIdentity(
            fingerprint=fingerprint.hexdigest(),
            sequences=first,
            tokens=sum(piece.tokens for piece in pieces),
            source_rows=None if source_rows is None else int(source_rows.max()) + 1,
        ),
        scoring=scoring,
        shards=tuple(planned),
        derived_from=tuple(origins),
        source={"dataset": ", ".join(datasets), **source_info},
        made_with=manifests[0].made_with,
    )
    has_prior = all(piece.rows is None for piece in pieces) and all(
        receipt.tail_prior_sha256 for source in sources for receipt in source.receipts(partial=True)
    )
    of_shards = tuple(tuple(pieces[i] for i in part) for part in parts)
    return Derivation(manifest, sources, of_shards, has_prior, source_rows)


def _numbered(rows: np.ndarray) -> np.ndarray | None:
    """Return the row of each sequence, int64 `[S]`, counted anew; None where each has one of its own.

    rows: int64 `[S, 2]`, the data and its row.
    """
    found, number = np.unique(rows, axis=0, return_inverse=True)
    return None if len(found) == len(rows) else number.reshape(-1).astype(np.int64)


def _wanted(rows: Rows, selection: Selection) -> np.ndarray:
    """bool, one per row."""
    mask = rows["loss_mask"]
    share = np.add.reduceat(mask.values, mask.offsets[:-1], dtype=np.int64) / mask.lengths
    inside = rows.sequence_id >= selection.first
    if selection.stop is not None:
        inside &= rows.sequence_id < selection.stop
    return inside & (share >= selection.min_loss_share)


def _grouped(pieces: Sequence[Piece], tokens: int) -> Iterator[list[int]]:
    """Indices of pieces that follow one another, at most `tokens` together."""
    group: list[int] = []
    held = 0
    for index, piece in enumerate(pieces):
        if group and held + piece.tokens > tokens:
            yield group
            group, held = [], 0
        group.append(index)
        held += piece.tokens
    yield group


def _derived_shard(derivation: Derivation, index: int, pieces: Sequence[Piece]) -> tuple[Rows, np.ndarray | None]:
    manifest = derivation.manifest
    parts: list[Rows] = []
    total = np.zeros(manifest.vocabulary_size) if derivation.has_prior else None
    for number, piece in enumerate(pieces):
        source = derivation.sources[piece.source]
        source.check_file(piece.shard)
        rows = source.read_shard(piece.shard)
        for problem in value_problems(rows, source.manifest):
            raise CacheError(f"{source.shard_path(piece.shard)}: {problem}")
        if piece.rows is not None:
            rows = rows.take(piece.rows)
        tail_sum = None if total is None else source.tail_sum(piece.shard)
        random = np.random.default_rng([manifest.scoring.seed, index, number])
        rows, tail_sum = reencode(rows, manifest.scoring, tail_sum, random)
        parts.append(rows)
        if total is not None and tail_sum is not None:
            total += tail_sum
    planned = manifest.shards[index]
    numbers = np.arange(planned.first, planned.first + planned.sequences, dtype=np.int64)
    own = None if derivation.source_rows is None else derivation.source_rows[numbers]
    return Rows(numbers, Rows.concatenated(parts).lists, own), total


def _sketch_kl(derivation: Derivation, pieces: Sequence[Piece]) -> float | None:
    """What the receipts of whole shards say of their sketch."""
    found = [derivation.sources[piece.source].receipt(piece.shard).sum_sketch_kl for piece in pieces]
    known = [value for value in found if value is not None]
    whole = len(known) == len(pieces) and all(piece.rows is None for piece in pieces)
    return sum(known) if whole and derivation.manifest.scoring.sketch is not None else None
