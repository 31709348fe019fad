"""Rows of text, of prompt and completion, of chat, or of token ids -> the sequences a teacher scores.

The corpus fixes the order: sequence i is the same whoever builds it, with however many processes, from whatever path.
Rows are tokenised into memory-mapped Arrow, so a corpus may be larger than memory. What cannot be scored is counted in
the report and left out, never scored in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stages.encode import special_pattern
from stages.processes import map_rows
from stages.records import EMPTY, KEPT, TOO_SHORT, WITHOUT_LOSS, record_schema
from stages.row_encoder import Kind, RowEncoder, find_kind
from stages.rows import Rows, full_disk_as_run_error
from stages.sources import load_rows
from storage.errors import UserError
from storage.words import are, counted

if TYPE_CHECKING:
    from datasets import Dataset

_SMALL_BYTES = 8 << 20  # below this much data, starting processes takes longer than tokenising
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1000

TURNS = ("all", "last", "each")


@dataclass(frozen=True)
class CorpusOptions:
    """Settings by which rows become sequences. Lengths are in tokens; a column left None is found by its usual name.

    end_ids: token ids that stop the teacher, for the end of an assistant turn. template_arguments: variables of the
    chat template. template_time: the time that the template is told; None for now.
    """

    max_length: int = 2048
    overlong: Literal["cut", "split"] = "cut"
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    tools_column: str | None = None  # of chats: the functions that the assistant may call
    turns: Literal["all", "last", "each"] = "all"  # of a chat: with a loss; `each` in a sequence of its own
    append_eos: bool = True  # to text and completions that do not end in it; a chat ends as its template says
    split: str | None = None
    limit: int | None = None  # rows
    processes: int | None = None  # None: all cores, or one for small data
    end_ids: tuple[int, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    template_time: datetime | None = None
    head: int | None = None  # width of the teacher's head; a row with an id beyond it is refused

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(
                f"The maximum length is {self.max_length}, but a sequence needs two tokens; give at least 2."
            )
        if self.overlong not in ("cut", "split"):
            raise UserError(f"Over-long rows cannot be treated as '{self.overlong}'; choose cut or split.")
        if self.turns not in TURNS:
            raise UserError(f"Turns to train on cannot be '{self.turns}'; choose {', '.join(TURNS)}.")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"The number of processes is {self.processes}; give at least 1, or none for all cores.")


@dataclass(frozen=True)
class CorpusReport:
    """What became of the rows. Where no row makes several sequences (`split`, `each`), rows = empty + too_short +
    without_loss + sequences.
    """

    rows: int
    empty: int  # rows: null, empty or only white space
    too_short: int  # rows of fewer than two tokens
    without_loss: int  # sequences left out because no position is trained (a prompt that fills them, no assistant)
    cut: int  # rows that lost what is beyond max_length
    split: int  # rows made into several sequences
    sequences: int
    tokens: int
    scored_positions: int  # tokens - sequences
    trained_positions: int  # scored positions with the loss mask set
    turns_without_end: int = 0  # assistant turns that end in no token that stops the teacher
    open_thoughts: int = 0  # assistant turns that answer inside the thought that the generation prompt opens
    unread_columns: tuple[str, ...] = ()
    special_text: int = 0  # rows with text that the tokenizer reads as special tokens
    unfinished: int = 0  # rows whose own columns say that their text was cut, so that no end token has a loss
    ended: int = 0  # sequences of text or completions that end with a trained end-of-sequence token
    notes: tuple[str, ...] = field(default=(), compare=False)  # on files that were passed over or not used


@dataclass(frozen=True)
class Sequence:
    """One sequence of L ids. Mask entry t is about scored position t, which predicts `input_ids[t+1]`."""

    sequence_id: int
    input_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L-1]
    source_row: int | None = None  # the row of the data it was made from, where a row made several


class CorpusFingerprint:
    """A sha256 over the lengths, ids and masks of sequences, and the rows they were made from where a row made several,
    whatever batches they come in.
    """

    def __init__(self) -> None:
        self._digests = [hashlib.sha256() for _ in range(3)]
        self._rows: str | None = None

    def add(self, lengths: np.ndarray, input_ids: np.ndarray, loss_masks: np.ndarray) -> None:
        """The next sequences: integers `[S]`, their ids one after another, their masks (bool) likewise."""
        for digest, array, dtype in zip(
            self._digests, (lengths, input_ids, loss_masks), ("<i4", "<i4", "u1"), strict=True
        ):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)

    def add_source_rows(self, source_rows: np.ndarray | None) -> None:
        """The rows of all sequences, integers `[S]`; None, which adds nothing, where each row made one."""
        if source_rows is not None:
            self._rows = hashlib.sha256(np.ascontiguousarray(source_rows, dtype="<i8").data).hexdigest()

    def hexdigest(self) -> str:
        found = b"".join(digest.digest() for digest in self._digests)
        return hashlib.sha256(found if self._rows is None else found + bytes.fromhex(self._rows)).hexdigest()


class Corpus:
    """Memory-mapped tokenised sequences in corpus order. `build_corpus` makes one.

    `lengths` is int32 [S]; `fingerprint` is a sha256 in hex over all lengths, ids and masks. `source_rows` is int64
    [S], the row of the data that each sequence was made from, counted over the rows that made one; None where each made
    one.
    """

    def __init__(
        self,
        records: Dataset,
        kept: np.ndarray | None,
        lengths: np.ndarray,
        report: CorpusReport,
        fingerprint: str,
        source_rows: np.ndarray | None = None,
    ) -> None:
        """`kept` is int64 [S]: which records are sequences (the others hold empty lists); None for all."""
        self._records = records.with_format("arrow")
        self._kept = kept
        self.lengths = lengths
        self.report = report
        self.fingerprint = fingerprint
        self.source_rows = source_rows

    @property
    def rows_used(self) -> int | None:
        """Return how many rows of the data made a sequence; None where each made one."""
        return None if self.source_rows is None else int(self.source_rows[-1]) + 1

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, start: int, stop: int) -> list[Sequence]:
        """Sequences `start` to `stop - 1`, as arrays of their own. Raises IndexError outside 0..len."""
        import pyarrow.compute as pc

        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"sequences {start}..{stop} of a corpus of {len(self)}")
        if start == stop:
            return []
        first, last = (start, stop - 1) if self._kept is None else self._kept[[start, stop - 1]].tolist()
        table = self._records[first : last + 1]
        # Records that were left out are empty lists, so the values are those of the sequences, end to end.
        ids = np.array(pc.list_flatten(table["input_ids"]).to_numpy(), dtype=np.int32)
        mask = np.array(pc.list_flatten(table["loss_mask"]).to_numpy(), dtype=bool)
        ends = np.cumsum(self.lengths[start:stop], dtype=np.int64)
        sequences = []
        for number, (end, length) in enumerate(zip(ends.tolist(), self.lengths[start:stop].tolist(), strict=True)):
            begin = end - length
            own = None if self.source_rows is None else int(self.source_rows[start + number])
            sequences.append(Sequence(start + number, ids[begin:end], mask[begin - number : end - number - 1], own))
        return sequences


def build_corpus(source: str, tokenizer: Any, options: CorpusOptions | None = None) -> Corpus:
    """Load, tokenise and count the rows of `source` (see `load_rows`) with a `transformers` tokenizer.

    A row is `text`; `prompt` and `completion`, texts or lists of messages (loss on the completion); chat `messages`
    (loss on the assistant's turns); or `input_ids`, with the masks of `stages.given_masks` where there are any.
    Raises UserError naming file, row and column; RunError (disk full, a worker process died).
    """
    options = options or CorpusOptions()
    rows = load_rows(source, split=options.split, limit=options.limit)
    try:
        kind = find_kind(rows, options)
        with full_disk_as_run_error(rows.scratch.name):
            rows.read(kind.read)
            records = _tokenise(rows, kind, tokenizer, options)
        return _collect(records, rows, kind, options, tokenizer.eos_token_id)
    finally:
        rows.close()


# ---- all rows ---------------------------------------------------------------------------------------------


def _tokenise(rows: Rows, kind: Kind, tokenizer: Any, options: CorpusOptions) -> Dataset:
    """The records of the rows, in the scratch folder, made by as many processes as the data is worth."""
    from stages.chat import ChatRenderer

    size = int(rows.dataset.data.nbytes)
    processes = options.processes or (1 if size < _SMALL_BYTES else _cores())
    renderer = ChatRenderer(
        tokenizer,
        turns=options.turns,
        end_ids=options.end_ids,
        arguments=options.template_arguments,
        moment=options.template_time,
    )
    encoder = RowEncoder(
        tokenizer,
        renderer,
        kind,
        options,
        rows.origin,
        rows.encoded,
        max([len(tokenizer), *(id + 1 for id in tokenizer.get_vocab().values())]),
        {} if rows.encoded else rows.features,
        special_pattern(tokenizer),
    )
    with _tokenizers_in_one_thread():
        return map_rows(
            encoder,
            rows.dataset,
            rows.scratch.name,
            schema=record_schema(),
            batch_rows=max(1, min(_BATCH_ROWS, _BATCH_BYTES * len(rows) // max(1, size))),
            processes=min(processes, len(rows)),
            what=rows.origin.source,
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _tokenizers_in_one_thread() -> Iterator[None]:
    """The parallelism is that of processes. Threads here would make every later fork of this process warn."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _collect(records: Dataset, rows: Rows, kind: Kind, options: CorpusOptions, end: int | None) -> Corpus:
    """Count and fingerprint the records in one pass. Raises UserError when no sequence is left.

    end: id of the end-of-sequence token, None where there is none.
    """
    counts = np.zeros(4, dtype=np.int64)
    lengths: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    row_of: list[np.ndarray] = []
    begun = 0
    overlong = special = trained = seen = without_end = open_thoughts = unfinished = ended = 0
    fingerprint = CorpusFingerprint()
    for batch in records.data.to_batches():
        outcome = batch["outcome"].to_numpy()
        counts += np.bincount(outcome, minlength=4)
        is_kept = outcome == KEPT
        kept.append(np.flatnonzero(is_kept) + seen)
        seen += len(outcome)
        rows_so_far = begun + np.cumsum(batch["begins"].to_numpy(zero_copy_only=False))
        row_of.append(rows_so_far[is_kept])
        begun = int(rows_so_far[-1]) if len(rows_so_far) else begun
        overlong += batch["overlong"].true_count
        special += batch["special"].true_count
        without_end += int(batch["turns_without_end"].to_numpy().sum())
        open_thoughts += int(batch["open_thoughts"].to_numpy().sum())
        own = batch["input_ids"].value_lengths().to_numpy()[is_kept]
        ids = batch["input_ids"].flatten().to_numpy()
        mask = batch["loss_mask"].flatten().to_numpy(zero_copy_only=False)
        lengths.append(own.astype(np.int32))
        trained += int(np.count_nonzero(mask))
        unfinished += batch["unfinished"].true_count
        if options.append_eos and end is not None and len(own) and kind.name in ("text", "completion"):
            ended += int(np.count_nonzero((ids[np.cumsum(own) - 1] == end) & mask[np.cumsum(own - 1) - 1]))
        fingerprint.add(own, ids, mask)
    sequences = int(counts[KEPT])
    if not sequences:
        unmarked = int(counts[WITHOUT_LOSS])
        without = f"{counted(unmarked, 'sequence')} {'has' if unmarked == 1 else 'have'}"
        raise UserError(
            f"Nothing of {rows.origin.source} is left to score: of {counted(len(rows), 'row')}, "
            f"{counts[EMPTY]} {are(counts[EMPTY])} empty, "
            f"{counts[TOO_SHORT]} {are(counts[TOO_SHORT])} shorter than two tokens, and {without} "
            f"no trained position within {options.max_length} tokens; check the columns and maximum length."
        )
    all_lengths = np.concatenate(lengths)
    tokens = int(all_lengths.sum(dtype=np.int64))
    report = CorpusReport(
        rows=len(rows),
        empty=int(counts[EMPTY]),
        too_short=int(counts[TOO_SHORT]),
        without_loss=int(counts[WITHOUT_LOSS]),
        cut=overlong if options.overlong == "cut" else 0,
        split=overlong if options.overlong == "split" else 0,
        sequences=sequences,
        tokens=tokens,
        scored_positions=tokens - sequences,
        trained_positions=trained,
        turns_without_end=without_end,
        open_thoughts=open_thoughts,
        unread_columns=tuple(name for name in rows.column_names if name not in kind.read),
        special_text=special,
        unfinished=unfinished,
        ended=ended,
        notes=rows.notes,
    )
    source_rows = numbered(np.concatenate(row_of))
    fingerprint.add_source_rows(source_rows)
    everything = sequences == seen
    kept_records = None if everything else np.concatenate(kept)
    return Corpus(records, kept_records, all_lengths, report, fingerprint.hexdigest(), source_rows)


def numbered(rows: np.ndarray) -> np.ndarray | None:
    """Return the row of each sequence, int64 `[S]`, counted from 0 over those that occur; None where each occurs once.

    rows: integers `[S]`; sequences of one row follow one another.
    """
    starts = np.ones(len(rows), bool)
    starts[1:] = rows[1:] != rows[:-1]
    return None if starts.all() else np.cumsum(starts, dtype=np.int64) - 1
