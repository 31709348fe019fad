"""Rows of text, of prompt and completion, of chat, or of token ids -> the sequences a teacher scores.

The corpus fixes the order: sequence i is the same whoever builds it, with however many processes, from
whatever path. Rows are tokenised by `datasets.map` into memory-mapped Arrow, so a corpus may be larger than
memory. What cannot be scored is counted in the report and left out, never scored in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from stages import given_masks
from stages.sources import (
    Origin,
    Rows,
    decode_columns,
    full_disk_as_run_error,
    load_rows,
    quiet_unless_terminal,
)
from storage.errors import RunError, UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from stages.chat import ChatRenderer, Rendered
    from stages.encode import Span
    from stages.messages import Chat

_KEPT, _EMPTY, _TOO_SHORT, _WITHOUT_LOSS = range(4)
_SMALL_BYTES = 8 << 20  # below this much data, starting processes takes longer than tokenising
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1000

TURNS = ("all", "last", "each")


class Encoded(NamedTuple):
    """One sequence of L ids before it is cut. without_end, open_thoughts: as in `stages.chat.Rendered`."""

    ids: np.ndarray  # int32 [L]
    mask: np.ndarray  # bool [L-1]
    without_end: int = 0
    open_thoughts: int = 0


Cells = Mapping[str, list[Any]]  # a batch of rows by column
# Columns of chats, the usual one first.
_MESSAGES = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class CorpusOptions:
    """How rows become sequences. Lengths are in tokens; a column left None is found by its usual name.

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


@dataclass(frozen=True)
class Sequence:
    """One sequence of L ids. Mask entry t is about scored position t, which predicts `input_ids[t+1]`."""

    sequence_id: int
    input_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L-1]


class CorpusFingerprint:
    """A sha256 over the lengths, ids and masks of sequences, whatever batches they come in."""

    def __init__(self) -> None:
        self._digests = [hashlib.sha256() for _ in range(3)]

    def add(self, lengths: np.ndarray, input_ids: np.ndarray, loss_masks: np.ndarray) -> None:
        """The next sequences: integers `[S]`, their ids one after another, their masks (bool) likewise."""
        for digest, array, dtype in zip(
            self._digests, (lengths, input_ids, loss_masks), ("<i4", "<i4", "u1"), strict=True
        ):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()


class Corpus:
    """Memory-mapped tokenised sequences in corpus order. `build_corpus` makes one.

    `lengths` is int32 [S]; `fingerprint` is a sha256 in hex over all lengths, ids and masks.
    """

    def __init__(
        self,
        records: Dataset,
        kept: np.ndarray | None,
        lengths: np.ndarray,
        report: CorpusReport,
        fingerprint: str,
    ) -> None:
        """`kept` is int64 [S]: which records are sequences (the others hold empty lists); None for all."""
        self._records = records.with_format("arrow")
        self._kept = kept
        self.lengths = lengths
        self.report = report
        self.fingerprint = fingerprint

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
            sequences.append(Sequence(start + number, ids[begin:end], mask[begin - number : end - number - 1]))
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
        kind = _find_kind(rows, options)
        with full_disk_as_run_error(rows.scratch.name):
            records = _tokenise(rows, kind, tokenizer, options)
        unread = tuple(name for name in rows.column_names if name not in kind.columns)
        return _collect(records, len(rows), source, options, unread)
    finally:
        rows.close()


# ---- which columns hold what ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What the rows are: `name` is text, completion, messages or tokens; `columns` are read in this order."""

    name: Literal["text", "completion", "messages", "tokens"]
    columns: tuple[str, ...]
    tools: str | None = None  # the column of tools beside chats


def _find_kind(rows: Rows, options: CorpusOptions) -> _Kind:
    """From the columns named in the options, else from those there are. Raises UserError listing them."""
    there = rows.column_names
    present = f"the columns of {rows.origin.source} are: {', '.join(there) or 'none'}"
    if options.tools_column and options.tools_column not in there:
        raise UserError(f"There is no column '{options.tools_column}': {present}; name one of those.")
    tools = options.tools_column or ("tools" if "tools" in there else None)
    beside = (*([tools] if tools else []), *(["system"] if "system" in there else []))
    named: list[_Kind] = []
    if options.text_column:
        named.append(_Kind("text", (options.text_column,)))
    if options.prompt_column or options.completion_column:
        pair = (options.prompt_column or "prompt", options.completion_column or "completion")
        named.append(_Kind("completion", (*pair, *beside), tools))
    if options.messages_column:
        named.append(_Kind("messages", (options.messages_column, *beside), tools))
    usual = [
        _Kind("text", ("text",)),
        _Kind("completion", ("prompt", "completion", *beside), tools),
        *(_Kind("messages", (name, *beside), tools) for name in _MESSAGES),
        _Kind("tokens", ("input_ids", *(name for name in given_masks.COLUMNS if name in there))),
    ]
    kinds = named or [kind for kind in usual if set(kind.columns) <= set(there)]
    if len(kinds) > 1:
        found = " or ".join("+".join(kind.columns) for kind in kinds)
        raise UserError(f"Rows could be read as {found}, and {present}; name one of them with a column option.")
    if not kinds:
        raise UserError(
            f"No column to read: {present}; name one as the text, prompt and completion, or messages column, "
            "or supply input_ids."
        )
    for column in kinds[0].columns:
        if column not in there:
            raise UserError(f"There is no column '{column}': {present}; name one of those.")
    if options.template_arguments and kinds[0].name in ("text", "tokens"):
        raise UserError(f"Template arguments belong to chats, and the rows are {kinds[0].columns[0]}; leave them out.")
    # What follows the first column, or prompt and completion, may be missing from some files.
    rows.require(kinds[0].columns[: 2 if kinds[0].name == "completion" else 1])
    return kinds[0]


# ---- rows to ids and masks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoder:
    """What `datasets.map` calls, in this or another process: rows -> one or more records for each."""

    tokenizer: Any
    renderer: ChatRenderer
    kind: _Kind
    options: CorpusOptions
    origin: Origin
    encoded: bool
    vocabulary_size: int
    stop_file: str  # there once a row was refused: `map` waits for every process, so the others hurry to the end

    def __call__(self, batch: Any, indices: list[int]) -> pa.Table:
        if os.path.exists(self.stop_file):
            return _records([], self.options)
        try:
            return _records(self._encode(batch, indices), self.options)
        except UserError:
            open(self.stop_file, "w").close()
            raise

    def _encode(self, batch: Any, indices: list[int]) -> list[Encoded | list[Encoded] | None]:
        names = self.kind.columns
        cells = dict(zip(names, decode_columns(batch, names, self.encoded), strict=True))
        encode: Any = {
            "text": self._texts,
            "completion": self._completions,
            "messages": self._chats,
            "tokens": self._tokens,
        }[self.kind.name]
        return encode(indices, cells)

    def _texts(self, indices: list[int], cells: Cells) -> list[Encoded | None]:
        values = cells[self.kind.columns[0]]
        texts = [self._text(value, row, 0) for value, row in zip(values, indices, strict=True)]
        full = [text for text in texts if text.strip()]
        encoded = iter(self._ids(full))
        return [self._whole(next(encoded)) if text.strip() else None for text in texts]

    def _completions(self, indices: list[int], cells: Cells) -> list[Encoded | list[Encoded] | None]:
        """Encode prompts and completions; a row where one of them is a list of messages is a chat."""
        from stages.encode import encode_spans
        from stages.messages import read_completion

        prompts, completions = (cells[name] for name in self.kind.columns[:2])
        results: list[Encoded | list[Encoded] | None] = [None] * len(indices)
        texts: list[str] = []
        spans: list[list[Span]] = []
        places: list[int] = []
        chats: dict[int, Chat] = {}
        for at, (prompt, completion, row) in enumerate(zip(prompts, completions, indices, strict=True)):
            if isinstance(prompt, list):
                if prompt and completion:
                    chats[at] = read_completion(prompt, completion, self.origin.where(row))
                continue
            prompt, completion = self._text(prompt, row, 0), self._text(completion, row, 1)
            if completion.strip():
                texts.append(prompt + completion)
                spans.append([(len(prompt), len(prompt) + len(completion))])
                places.append(at)
        encoded = encode_spans(self.tokenizer, texts, spans, add_special_tokens=True) if texts else []
        for at, each in zip(places, encoded, strict=True):
            results[at] = self._marked(*each)
        for at, sequences in self._rendered(chats, indices, cells).items():
            results[at] = sequences
        return results

    def _chats(self, indices: list[int], cells: Cells) -> list[list[Encoded] | None]:
        from stages.messages import read_chat

        values = cells[self.kind.columns[0]]
        chats = {
            at: read_chat(value, self.origin.where(row))
            for at, (value, row) in enumerate(zip(values, indices, strict=True))
            if value is not None and value != [] and value != ""
        }
        rendered = self._rendered(chats, indices, cells)
        return [rendered.get(at) for at in range(len(indices))]

    def _rendered(self, chats: Mapping[int, Chat], indices: list[int], cells: Cells) -> dict[int, list[Encoded]]:
        """Render and encode chats by their place in the batch; tools and system prompt may stand beside them."""
        from stages.messages import read_tools, with_system

        pieces: list[tuple[int, Rendered]] = []
        for at, chat in chats.items():
            where = self.origin.where(indices[at])
            tools = read_tools(cells[self.kind.tools][at], where) if self.kind.tools else None
            if "system" in cells:
                chat = with_system(chat, cells["system"][at], where)
            pieces += [(at, sequence) for sequence in self.renderer.render(chat, where, tools)]
        found: dict[int, list[Encoded]] = {at: [] for at in chats}
        encoded = self.renderer.encode([sequence for _, sequence in pieces])
        for (at, sequence), (ids, marks) in zip(pieces, encoded, strict=True):
            found[at].append(Encoded(ids, marks[1:], sequence.without_end, sequence.open_thoughts))
        return found

    def _tokens(self, indices: list[int], cells: Cells) -> list[Encoded | None]:
        masks = {name: values for name, values in cells.items() if name in given_masks.COLUMNS}
        results: list[Encoded | None] = []
        for at, (value, row) in enumerate(zip(cells["input_ids"], indices, strict=True)):
            if value is None or (isinstance(value, (list, np.ndarray)) and len(value) == 0):
                results.append(None)
                continue
            where = f"{self.origin.where(row)}, column 'input_ids'"
            ids = _integers(value)
            if ids is None:
                raise UserError(f"The token ids in {where} are not a list of whole numbers; mend or remove the row.")
            given = {name: values[at] for name, values in masks.items()}
            ids, mask = given_masks.apply_masks(ids, given, self._places(row))
            wrong = (ids < 0) | (ids >= self.vocabulary_size)
            if wrong.any():
                place = int(np.argmax(wrong))
                raise UserError(
                    f"Token id {ids[place]} at place {place} of {where} is not in the tokenizer's vocabulary "
                    f"of {self.vocabulary_size}; tokenise with the teacher's tokenizer."
                )
            results.append(Encoded(ids.astype(np.int32), mask))
        return results

    def _places(self, row: int) -> Callable[[str], str]:
        return lambda column: f"{self.origin.where(row)}, column '{column}'"

    def _text(self, value: Any, row: int, column: int) -> str:
        """The text in a cell, "" for null. Raises UserError for anything else."""
        from stages.encode import check_text

        if value is None:
            return ""
        where = f"{self.origin.where(row)}, column '{self.kind.columns[column]}'"
        if not isinstance(value, str):
            raise UserError(
                f"The value in {where} is of type {type(value).__name__}, not text; mend or remove the row."
            )
        check_text(value, where)
        return value

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _whole(self, ids: list[int]) -> Encoded:
        """Plain text: every position is trained."""
        full = np.asarray(self._with_eos(ids), dtype=np.int32)
        return Encoded(full, np.ones(max(0, len(full) - 1), dtype=bool))

    def _marked(self, ids: np.ndarray, marks: np.ndarray) -> Encoded:
        """Prompt and completion: position t is trained when token t+1 is the completion's, eos included."""
        full = np.asarray(self._with_eos(ids.tolist()), dtype=np.int32)
        marks = np.concatenate([marks, np.ones(len(full) - len(ids), dtype=bool)])
        return Encoded(full, marks[1:])

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if not self.options.append_eos or eos is None or (ids and ids[-1] == eos):
            return ids
        return [*ids, eos]


def _integers(value: Any) -> np.ndarray | None:
    """int64 [L], or None when `value` is no flat list of whole numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iu" else None


def _pieces(ids: np.ndarray, mask: np.ndarray, options: CorpusOptions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The row cut to `max_length`, or split so that every scored position falls into exactly one piece.

    Each piece after the first starts with the last token of the one before: its first scored position is the
    next one, and no piece is shorter than two tokens.
    """
    longest = options.max_length
    if len(ids) <= longest or options.overlong == "cut":
        yield ids[:longest], mask[: longest - 1]
        return
    for start in range(0, len(ids) - 1, longest - 1):
        yield ids[start : start + longest], mask[start : start + longest - 1]


def _records(encoded: Iterable[Encoded | list[Encoded] | None], options: CorpusOptions) -> pa.Table:
    """A table of records: ids and mask of each sequence, empty lists for what is left out, and why it is.

    `overlong` is True on the first record of a row that was cut or split, and counts of a row's turns stand there.
    """
    import pyarrow as pa

    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    outcomes: list[int] = []
    overlong: list[bool] = []
    turns: list[tuple[int, int]] = []  # without an end, in an open thought
    nothing = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
    for row in encoded:
        parts = row if isinstance(row, list) else [row]
        found: list[tuple[np.ndarray, np.ndarray, int]] = []
        for part in parts:
            if part is None or len(part.ids) < 2:
                found.append((*nothing, _EMPTY if part is None else _TOO_SHORT))
                continue
            pieces = _pieces(part.ids, part.mask, options)
            found += [(*piece, _KEPT) if piece[1].any() else (*nothing, _WITHOUT_LOSS) for piece in pieces]
        is_long = any(part is not None and len(part.ids) > options.max_length for part in parts)
        flags = (
            sum(part.without_end for part in parts if part is not None),
            sum(part.open_thoughts for part in parts if part is not None),
        )
        for place, (piece_ids, mask, outcome) in enumerate(found):
            turns.append(flags if place == 0 else (0, 0))
            ids.append(piece_ids)
            masks.append(mask)
            outcomes.append(outcome)
            overlong.append(place == 0 and is_long)
    columns = [
        _lists(ids, np.int32),
        _lists(masks, bool),
        pa.array(outcomes, pa.int8()),
        pa.array(overlong, pa.bool_()),
        pa.array([without_end for without_end, _ in turns], pa.int32()),
        pa.array([open_thoughts for _, open_thoughts in turns], pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=_record_schema())


def _lists(arrays: list[np.ndarray], dtype: type) -> pa.Array:
    import pyarrow as pa

    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype, copy=False)))


def _record_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.bool_())),
            ("outcome", pa.int8()),
            ("overlong", pa.bool_()),
            ("turns_without_end", pa.int32()),
            ("open_thoughts", pa.int32()),
        ]
    )


# ---- all rows ---------------------------------------------------------------------------------------------


def _tokenise(rows: Rows, kind: _Kind, tokenizer: Any, options: CorpusOptions) -> Dataset:
    """Map the rows to records in the scratch folder, in as many processes as the data is worth."""
    from datasets import Features

    from stages.chat import ChatRenderer

    dataset = rows.dataset if rows.encoded else rows.dataset.select_columns(list(kind.columns))
    size = int(dataset.data.nbytes)
    processes = options.processes or (1 if size < _SMALL_BYTES else _cores())
    processes = min(processes, len(dataset))
    vocabulary_size = max([len(tokenizer), *(id + 1 for id in tokenizer.get_vocab().values())])
    stop_file = os.path.join(rows.scratch.name, "stop")
    renderer = ChatRenderer(
        tokenizer,
        turns=options.turns,
        end_ids=options.end_ids,
        arguments=options.template_arguments,
        moment=options.template_time,
    )
    encoder = _Encoder(tokenizer, renderer, kind, options, rows.origin, rows.encoded, vocabulary_size, stop_file)
    with quiet_unless_terminal(), _tokenizers_in_one_thread():
        try:
            return dataset.map(
                encoder,
                with_indices=True,
                batched=True,
                batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES * len(dataset) // max(1, size))),
                remove_columns=dataset.column_names,
                features=Features.from_arrow_schema(_record_schema()),
                num_proc=None if processes == 1 else processes,
                cache_file_name=os.path.join(rows.scratch.name, "records.arrow"),
                load_from_cache_file=False,
                new_fingerprint=os.path.basename(rows.scratch.name),  # else it would hash the tokenizer
                desc="Tokenising",
            )
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            raise RunError(
                f"A process that tokenised {rows.origin.source} died, most likely for want of memory; "
                "use fewer processes."
            ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _tokenizers_in_one_thread() -> Iterator[None]:
    """The parallelism is that of `map`. Threads here would make every later fork of this process warn.

    `map` also replaces `os.environ` by a copy; the object itself is put back.
    """
    environ, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003 - it is the same object as before
        if before is None:
            environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            environ["TOKENIZERS_PARALLELISM"] = before


def _collect(records: Dataset, rows: int, source: str, options: CorpusOptions, unread: tuple[str, ...]) -> Corpus:
    """Count and fingerprint the records in one pass. Raises UserError when no sequence is left."""
    counts = np.zeros(4, dtype=np.int64)
    lengths: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    overlong = trained = seen = without_end = open_thoughts = 0
    fingerprint = CorpusFingerprint()
    for batch in records.data.to_batches():
        outcome = batch["outcome"].to_numpy()
        counts += np.bincount(outcome, minlength=4)
        is_kept = outcome == _KEPT
        kept.append(np.flatnonzero(is_kept) + seen)
        seen += len(outcome)
        overlong += batch["overlong"].true_count
        without_end += int(batch["turns_without_end"].to_numpy().sum())
        open_thoughts += int(batch["open_thoughts"].to_numpy().sum())
        own = batch["input_ids"].value_lengths().to_numpy()[is_kept]
        ids = batch["input_ids"].flatten().to_numpy()
        mask = batch["loss_mask"].flatten().to_numpy(zero_copy_only=False)
        lengths.append(own.astype(np.int32))
        trained += int(np.count_nonzero(mask))
        fingerprint.add(own, ids, mask)
    sequences = int(counts[_KEPT])
    if not sequences:
        raise UserError(
            f"Nothing of {source} is left to score: of {rows} rows, {counts[_EMPTY]} are empty, "
            f"{counts[_TOO_SHORT]} are shorter than two tokens, and {counts[_WITHOUT_LOSS]} sequences have "
            f"no trained position within {options.max_length} tokens; check the columns and maximum length."
        )
    all_lengths = np.concatenate(lengths)
    tokens = int(all_lengths.sum(dtype=np.int64))
    report = CorpusReport(
        rows=rows,
        empty=int(counts[_EMPTY]),
        too_short=int(counts[_TOO_SHORT]),
        without_loss=int(counts[_WITHOUT_LOSS]),
        cut=overlong if options.overlong == "cut" else 0,
        split=overlong if options.overlong == "split" else 0,
        sequences=sequences,
        tokens=tokens,
        scored_positions=tokens - sequences,
        trained_positions=trained,
        turns_without_end=without_end,
        open_thoughts=open_thoughts,
        unread_columns=unread,
    )
    everything = sequences == seen
    return Corpus(records, None if everything else np.concatenate(kept), all_lengths, report, fingerprint.hexdigest())
