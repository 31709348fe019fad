"""The columns of a shard: names, dtypes, shapes, units. The one place where the format is written down.

One row is one sequence of L token ids; it has exactly L-1 scored positions. Position t is the teacher's
distribution after reading `input_ids[:t+1]`; its gold token is `input_ids[t+1]`. P of the positions have
the loss mask set ("stored positions"); only they keep top-N entries, E = sum(top_count) of them.

`docs/format.md` is generated from this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 1

# Keys of the Parquet schema metadata of every shard.
META_FORMAT = b"teacher_logit_cache.format_version"
META_CACHE_ID = b"teacher_logit_cache.cache_id"
META_SHARD = b"teacher_logit_cache.shard"
# Only where `top_logprobs` are codes: a code c stands for -(step * c)^2 nats.
META_STEP = b"teacher_logit_cache.top_logprobs_step"

_TEMPERATURE_PREFIX = "tail_logmass_T"


@dataclass(frozen=True)
class Column:
    """One column. `per` says what its list counts: ids (L), positions (L-1), entries (E), stored positions (P), these
    times the samples (M) or the codes (r) of each.
    """

    name: str
    element: pa.DataType
    per: str
    unit: str
    meaning: str
    optional: bool = False

    @property
    def is_list(self) -> bool:
        return self.per != "row"

    @property
    def type(self) -> pa.DataType:
        if not self.is_list:
            return self.element
        return pa.list_(pa.field("element", self.element, nullable=False))

    @property
    def is_quantized(self) -> bool:
        """Whether its bytes are codes of log-probabilities (`storage.quantization`)."""
        return quantized(self.name, self.element)

    @property
    def dtype(self) -> np.dtype:
        """Of its values in memory, where codes of log-probabilities are log-probabilities."""
        return np.dtype(np.float32 if self.is_quantized else self.element.to_pandas_dtype())

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=False, metadata={"unit": self.unit, "per": self.per})


SEQUENCE_ID = Column("sequence_id", pa.int64(), "row", "index", "index of the sequence in corpus order")
SOURCE_ROW = Column(
    "source_row",
    pa.int64(),
    "row",
    "index",
    "row of the data that the sequence was made from, counted over the rows that made one; only in caches where a row "
    "made several, whose sequences must be held out together",
    optional=True,
)
INPUT_IDS = Column("input_ids", pa.int32(), "L", "token id", "the sequence")
LOSS_MASK = Column("loss_mask", pa.bool_(), "L-1", "bool", "positions that are trained on (completion or assistant)")
GOLD_LOGPROB = Column("gold_logprob", pa.float32(), "L-1", "nats", "log p(gold), whether or not gold is in the top-N")
TAIL_LOGMASS = Column(
    "tail_logmass", pa.float32(), "L-1", "nats", "log of the mass outside top-N and gold; -inf when empty"
)
ENTROPY = Column(
    "entropy", pa.float16(), "L-1", "nats", "entropy of the full distribution; absent where the engine cannot tell"
)
TOP_COUNT = Column(
    "top_count",
    pa.uint16(),
    "L-1",
    "entries",
    "top-N entries of this position (adaptive N: of its prefix); 0 where masked out",
)
TOP_IDS = Column("top_ids", pa.int32(), "E", "token id", "ids of the entries, most probable first")
TOP_LOGPROBS = Column(
    "top_logprobs", pa.float16(), "E", "nats", "their log-probabilities, descending; as codes c: -(step c)^2"
)
TAIL_SAMPLES = Column(
    "tail_samples",
    pa.int32(),
    "P*M",
    "token id",
    "M ids per stored position drawn from the tail in proportion to p, one from each M-th of its mass in id order, "
    "so an id may come twice; -1 where the tail is empty",
    optional=True,
)

SKETCH_CODES = Column(
    "sketch_codes",
    pa.uint8(),
    "P*r",
    "steps",
    "code c of the teacher's last hidden state, 1..255; with `sketch.safetensors` the logits of the tail are about "
    "bias + basis (scales * (c - 128))",
    optional=True,
)
RESIDUAL_SAMPLES = Column(
    "residual_samples",
    pa.int32(),
    "P*M",
    "token id",
    "M ids per stored position drawn from the tail, w the tail that the codes give, both summing to 1: the first "
    "ceil(M/2) in proportion to max(p - w, 0), the others to max(w - p, 0); of no meaning where residual_mass is 0",
    optional=True,
)
RESIDUAL_MASS = Column(
    "residual_mass",
    pa.float16(),
    "P",
    "probability",
    "R, the sum of |p - w| over the tail: w, plus R/2 shared out among the former samples, less R/2 among the latter, "
    "has the expectation p",
    optional=True,
)

_STANDARD = (
    SEQUENCE_ID,
    INPUT_IDS,
    LOSS_MASK,
    GOLD_LOGPROB,
    TAIL_LOGMASS,
    ENTROPY,
    TOP_COUNT,
    TOP_IDS,
    TOP_LOGPROBS,
)


def quantized(name: str, element: pa.DataType) -> bool:
    """Whether a column of this name and type holds codes of log-probabilities."""
    return name == TOP_LOGPROBS.name and element == pa.uint8()


LOGPROB_TYPES = {8: pa.uint8(), 16: pa.float16(), 32: pa.float32()}
# A uint16 count bounds the entries of a position.
MAX_TOP_N = 65_535


def temperature_column(temperature: float) -> Column:
    """The column of `log sum_{j not in K} p_j^(1/T)` for one extra temperature, named e.g. `tail_logmass_T2`."""
    return Column(
        f"{_TEMPERATURE_PREFIX}{temperature:g}",
        pa.float32(),
        "L-1",
        "nats",
        "log of the sum of p^(1/T) outside top-N and gold, p at temperature 1; one column per extra temperature",
        optional=True,
    )


def column_temperature(name: str) -> float | None:
    """The temperature of a `tail_logmass_T...` column, or None for any other name."""
    match = re.fullmatch(re.escape(_TEMPERATURE_PREFIX) + r"([0-9.e+-]+)", name)
    return float(match.group(1)) if match else None


def columns(
    logprob_bits: int = 16,
    temperatures: Iterable[float] = (),
    tail_samples: int = 0,
    entropy: bool = True,
    sketch_rank: int = 0,
    residual_samples: int = 0,
) -> tuple[Column, ...]:
    """The columns of a cache with these options, in file order."""
    logprobs = Column(**{**TOP_LOGPROBS.__dict__, "element": LOGPROB_TYPES[logprob_bits]})
    chosen = [
        logprobs if column is TOP_LOGPROBS else column for column in _STANDARD if entropy or column is not ENTROPY
    ]
    chosen += [temperature_column(t) for t in sorted(temperatures)]
    if tail_samples:
        chosen.append(TAIL_SAMPLES)
    if sketch_rank:
        chosen.append(SKETCH_CODES)
    if residual_samples:
        chosen += [RESIDUAL_SAMPLES, RESIDUAL_MASS]
    return tuple(chosen)


def format_markdown() -> str:
    """The column table of `docs/format.md`."""
    rows = [*_STANDARD, Column(**{**temperature_column(2).__dict__, "name": "tail_logmass_T…"}), TAIL_SAMPLES]
    rows.insert(1, SOURCE_ROW)
    rows += [SKETCH_CODES, RESIDUAL_SAMPLES, RESIDUAL_MASS]
    lines = ["| column | type | length | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for column in rows:
        kind = f"list<{column.element}>" if column.is_list else str(column.element)
        if column is TOP_LOGPROBS:
            kind += "`, `list<float>` or `list<uint8>"
        kind = kind.replace("halffloat", "float16").replace("<float>", "<float32>")
        meaning = column.meaning + (" (optional)" if column.optional else "")
        lines.append(f"| `{column.name}` | `{kind}` | {column.per} | {column.unit} | {meaning} |")
    return "\n".join(lines) + "\n"
