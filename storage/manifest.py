"""What a cache is (`manifest.json`) and what each finished shard holds (its receipt).

The manifest is written once, before the first shard, and never changes: it is the identity that every shard,
every resuming run and every student is checked against. What is learned later stands in the receipts.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from storage import schema
from storage.errors import CacheError, UserError
from storage.files import write_json
from storage.json_text import parse_json
from storage.limits import JSON_BYTES
from storage.places import Place, place

_MOST_FIELDS = 1000
# Lists and mappings in one another, of which a manifest has four.
_DEEPEST = 32
# Ids are int32 and everything that is counted fits int64 with room to multiply: larger numbers are damage or malice.
_MAX_ID = 2**31 - 1
_MAX_COUNT = 2**48
# Fields of `scoring` that the first caches did not have, with what stands for not having them.
_LATER_SCORING: dict[str, object] = {"tail_epsilon": 0.0, "min_n": 1, "sketch": None}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherIdentity(_Model):
    """Which model. `weights` is a fingerprint of the weight files, `revision` the hub commit where there is one."""

    name: str
    revision: str | None = None
    architecture: str
    config_sha256: str
    weights: str | None = None


class TokenizerIdentity(_Model):
    """Hashes of what must agree between teacher and student: token -> id, and how text becomes tokens."""

    vocabulary_sha256: str
    behaviour_sha256: str
    chat_template_sha256: str | None = None
    tokens: int


class CorpusIdentity(_Model):
    """The tokenised corpus. `fingerprint` covers ids, loss masks and their order, not paths.

    source_rows: rows of the data that made a sequence, where a row made several; None where each made one.
    """

    fingerprint: str
    sequences: int = Field(ge=1, le=_MAX_COUNT)
    tokens: int = Field(ge=2, le=_MAX_COUNT)
    source_rows: int | None = Field(default=None, ge=1, le=_MAX_COUNT)


class SketchIdentity(_Model):
    """The sketch of a cache: codes per position, residual samples per position (M), the positions that its calibration
    was to see, and the sha256 of `sketch.safetensors`, which every manifest on disk names.
    """

    rank: int = Field(ge=1)
    residual_samples: int = Field(default=0, ge=0)
    positions: int = Field(ge=1)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class ScoringOptions(_Model):
    """What is kept at each position, and in which precision the teacher ran."""

    engine: str
    dtype: str
    top_n: int = Field(ge=1, le=schema.MAX_TOP_N)
    logprob_bits: int = 16
    temperatures: tuple[float, ...] = ()
    tail_samples: int = Field(default=0, ge=0, le=schema.MAX_TOP_N)
    entropy: bool = True
    sketch: SketchIdentity | None = None
    # What generators of random numbers take.
    seed: int = Field(default=0, ge=0, lt=2**64)
    max_length: int = Field(ge=2, le=_MAX_ID)
    tail_epsilon: float = Field(default=0.0, ge=0, lt=1)
    min_n: int = Field(default=1, ge=1, le=schema.MAX_TOP_N)

    @model_validator(mode="after")
    def _check(self) -> ScoringOptions:
        if self.logprob_bits not in schema.LOGPROB_TYPES:
            raise ValueError(f"logprob_bits must be one of {sorted(schema.LOGPROB_TYPES)}")
        if any(not 0 < t < math.inf or t == 1 for t in self.temperatures):
            raise ValueError("extra temperatures must be positive, finite and not 1, which is always there")
        if self.min_n > self.top_n:
            raise ValueError("min_n is larger than top_n")
        names = {schema.temperature_column(t).name for t in (1.0, *self.temperatures)}
        if len(names) <= len(self.temperatures):
            raise ValueError("extra temperatures must differ from 1 and each other in six digits")
        return self

    @property
    def columns(self) -> tuple[schema.Column, ...]:
        sketch = self.sketch
        return schema.columns(
            self.logprob_bits,
            self.temperatures,
            self.tail_samples,
            self.entropy,
            sketch.rank if sketch else 0,
            sketch.residual_samples if sketch else 0,
        )

    @property
    def per_stored_position(self) -> dict[str, int]:
        """How many values each stored position has in the columns that count stored positions."""
        counts = {schema.TAIL_SAMPLES.name: self.tail_samples}
        if self.sketch is not None:
            counts |= {
                schema.SKETCH_CODES.name: self.sketch.rank,
                schema.RESIDUAL_SAMPLES.name: self.sketch.residual_samples,
                schema.RESIDUAL_MASS.name: 1,
            }
        return counts


class Origin(_Model):
    """A cache that this one was made from, by `pipeline select` or `merge`, and which of its sequences it took.

    `first` and `stop` bound their numbers there; `shards` are those that were there, where not all were.
    """

    cache_id: str
    sequences: int = Field(ge=1)
    first: int = Field(ge=0)
    stop: int = Field(ge=1)
    min_loss_share: float = 0.0
    shards: tuple[int, ...] | None = None


class PlannedShard(_Model):
    """A fixed range of sequences: `first .. first + sequences`."""

    first: int = Field(ge=0, le=_MAX_COUNT)
    sequences: int = Field(ge=1, le=_MAX_COUNT)
    tokens: int = Field(ge=2, le=_MAX_COUNT)


class Manifest(_Model):
    """The identity of a cache. `made_with` and `source` inform; everything else must agree to resume."""

    format_version: int = Field(default=schema.FORMAT_VERSION, strict=True, ge=1, le=schema.FORMAT_VERSION)
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    vocabulary_size: int = Field(ge=2, le=_MAX_ID)
    corpus: CorpusIdentity
    scoring: ScoringOptions
    shards: Annotated[tuple[PlannedShard, ...], FailFast()] = Field(min_length=1)
    derived_from: Annotated[tuple[Origin, ...], FailFast()] = ()
    source: dict[str, Any] = Field(default_factory=dict)
    made_with: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_plan(self) -> Manifest:
        expected = 0
        for shard in self.shards:
            if shard.first != expected:
                raise ValueError(f"the plan of shards has a gap or overlap at sequence {expected}")
            expected += shard.sequences
        if expected != self.corpus.sequences:
            raise ValueError(f"the plan holds {expected} sequences, the corpus {self.corpus.sequences}")
        if (self.corpus.source_rows or 0) > expected:
            raise ValueError(f"{self.corpus.source_rows} rows cannot have made {expected} sequences")
        if self.scoring.top_n > self.vocabulary_size:
            raise ValueError("top_n is larger than the vocabulary")
        return self

    @property
    def columns(self) -> tuple[schema.Column, ...]:
        """The columns of every shard, in file order."""
        first, *others = self.scoring.columns
        return (first, *([] if self.corpus.source_rows is None else [schema.SOURCE_ROW]), *others)

    @property
    def identity(self) -> dict[str, Any]:
        """The part that decides whether two commands make the same cache, as plain JSON values.

        Fields that came later count only where they say something, so that older caches keep their identity.
        """
        found = self.model_dump(mode="json", exclude={"source", "made_with"})
        for name, default in _LATER_SCORING.items():
            if found["scoring"][name] == default:
                del found["scoring"][name]
        if not self.derived_from:
            del found["derived_from"]
        if self.corpus.source_rows is None:
            del found["corpus"]["source_rows"]
        return found

    @property
    def cache_id(self) -> str:
        """Sixteen hex digits of the identity's hash, written into every shard and receipt."""
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def differences(self, other: Manifest) -> list[str]:
        """Return the differences from `other`, as `name: ours, not theirs`; empty when they are the same cache.

        Another corpus is said in words, and the plan of shards, which follows from it, is then not named.
        """
        found = _differences("", self.identity, other.identity)
        if self.corpus == other.corpus:
            return found
        ours, theirs = self.corpus, other.corpus
        counts = f"{ours.sequences} sequences of {ours.tokens} tokens, not {theirs.sequences} of {theirs.tokens}"
        if (ours.sequences, ours.tokens) == (theirs.sequences, theirs.tokens):
            counts = f"{ours.sequences} sequences of {ours.tokens} tokens as before, but not the same ones"
        changed = f"the corpus changed, by its rows, the tokenizer or an option that makes sequences of rows: {counts}"
        return [changed, *(line for line in found if not line.startswith(("corpus.", "shards:")))]


class Receipt(_Model):
    """Written after its shard is whole and durable: a shard without a receipt does not exist."""

    cache_id: str
    shard: int = Field(ge=0, le=_MAX_COUNT)
    rows: int = Field(ge=1, le=_MAX_COUNT)
    tokens: int = Field(ge=2, le=_MAX_COUNT)
    stored_positions: int = Field(ge=0, le=_MAX_COUNT)
    entries: int = Field(ge=0, le=_MAX_COUNT)
    bytes: int = Field(ge=1, le=_MAX_COUNT)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tail_prior_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    sum_tail_mass: float = Field(ge=0)
    sum_unc: float = Field(ge=0)
    sum_sketch_kl: float | None = Field(default=None, ge=0)
    sum_residual_mass: float | None = Field(default=None, ge=0)
    seconds: float = Field(ge=0)


class PriorReceipt(_Model):
    """Of the tail prior, which is the whole cache's."""

    cache_id: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Part(_Model):
    """Which shards are here, where not all are (`partial.json`)."""

    shards: Annotated[tuple[int, ...], FailFast()] = Field(min_length=1)


def _differences(prefix: str, ours: Any, theirs: Any) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found: list[str] = []
        for key in sorted(set(ours) | set(theirs)):
            name = f"{prefix}.{key}" if prefix else key
            found += _differences(name, ours.get(key), theirs.get(key))
        return found
    if ours == theirs:
        return []
    if prefix == "shards":
        return ["shards: a different plan (--shard-tokens)"]
    return [f"{prefix}: {_shown(ours)}, not {_shown(theirs)}"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


_M = TypeVar("_M", bound=BaseModel)


def checked(model: type[_M], **values: Any) -> _M:
    """Return `model(**values)` of values that a person chose. Raise UserError, with the first reason, for bad ones."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1]).replace("_", " ")
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"these options cannot be kept in a cache: {name}{': ' if name else ''}{reason}") from None


def _read_model(path: Place, model: type[_M], what: str) -> _M:
    try:
        raw = parse_json(_json_bytes(path, f"a {what}"))
    except FileNotFoundError:
        raise CacheError(f"{path}: there is no {what} here") from None
    except OSError as error:
        raise CacheError(f"{path}: the {what} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: the {what} is not JSON ({str(error)[:80]})") from None
    if not isinstance(raw, dict):
        raise CacheError(f"{path}: the {what} is not a JSON object")
    # Each field that is not known would be an error of its own, with all its words.
    if (fields := max(len(raw), *(len(each) for each in raw.values() if isinstance(each, dict)), 0)) > _MOST_FIELDS:
        raise CacheError(f"{path}: the {what} is damaged: it has {fields:,} fields in one place")
    if problem := _odd_text(raw):
        raise CacheError(f"{path}: the {what} is damaged: {problem}")
    version = raw.get("format_version", schema.FORMAT_VERSION)
    if isinstance(version, int) and version > schema.FORMAT_VERSION:
        raise CacheError(
            f"{path}: format version {str(version)[:40]} is newer than the {schema.FORMAT_VERSION} this program reads; "
            "upgrade teacher-logit-cache"
        )
    try:
        # Through JSON text, so that strictness is JSON's own (a list for a tuple is right).
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"][:8]) or "the whole"
        raise CacheError(f"{path}: the {what} is damaged at {where}: {first['msg'][:200]}") from None


def _odd_text(raw: dict[str, Any]) -> str | None:
    """Why JSON that could be read cannot be written again; None where it can."""
    level: list[Any] = [raw]
    for _ in range(_DEEPEST):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]
        if not level:
            break
    else:
        return f"nested more than {_DEEPEST} deep"
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "it holds half a character (\\ud800 to \\udfff), which no text has"
    return None


def _json_bytes(path: Place, what: str) -> bytes:
    """The bytes of a JSON file. Raises CacheError, before it is read, for one that is longer than it may be."""
    JSON_BYTES.check(path, path.stat().st_size, what)
    return place(path).read_at_most(JSON_BYTES.value, what)


def read_manifest(path: Place) -> Manifest:
    """Raises CacheError: missing, not JSON, damaged, or of a newer format version."""
    return _read_model(path, Manifest, "manifest")


def peek_section(cache: Place, name: str) -> dict[str, Any]:
    """Return one section of the manifest in a directory, unchecked; nothing where it cannot be read."""
    try:
        found = json.loads(_json_bytes(cache / "manifest.json", "a manifest"))[name]
    except (CacheError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_receipt(path: Place) -> Receipt:
    return _read_model(path, Receipt, "receipt")


def read_prior_receipt(path: Place) -> PriorReceipt:
    return _read_model(path, PriorReceipt, "receipt of the tail prior")


def read_part(path: Place) -> Part:
    return _read_model(path, Part, "list of shards")


def write_model(path: Place, model: BaseModel, *, exclusive: bool = False) -> None:
    write_json(path, model.model_dump(mode="json"), exclusive=exclusive)
