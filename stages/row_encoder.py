"""Rows to records: which columns hold what, and each kind of row to token ids and loss masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stages import endings, given_masks
from stages.encode import check_text, encode_spans, has_special_text
from stages.messages import MESSAGE_COLUMNS
from stages.parquet_files import UNSUPPORTED
from stages.records import Encoded, EncodedRow, records
from stages.rows import Origin, Rows, decode_columns
from stages.teacher_checks import refuse_beyond_head
from storage.errors import UserError
from storage.words import listed_briefly

if TYPE_CHECKING:
    import pyarrow as pa

    from stages.chat import ChatRenderer, Rendered
    from stages.corpus import CorpusOptions
    from stages.encode import Span
    from stages.messages import Chat

_ROW_ARGUMENTS = "chat_template_kwargs"  # TRL's column of variables for the template
Cells = Mapping[str, list[Any]]  # a batch of rows by column


# ---- which columns hold what ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Names the form of the rows: `name` is text, completion, messages or tokens; `columns` are read in this order.

    endings: columns that say whether the text of a row was cut when it was written.
    """

    name: Literal["text", "completion", "messages", "tokens"]
    columns: tuple[str, ...]
    tools: str | None = None  # the column of tools beside chats
    endings: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.columns, *self.endings)


def find_kind(rows: Rows, options: CorpusOptions) -> Kind:
    """From the columns named in the options, else from those there are. Raises UserError listing them."""
    there = rows.column_names
    present = f"the columns of {rows.origin.source} are: {listed_briefly(there) or 'none'}"
    if options.tools_column and options.tools_column not in there:
        raise UserError(f"There is no column '{options.tools_column}': {present}; name one of those.")
    tools = options.tools_column or ("tools" if "tools" in there else None)
    beside = (*([tools] if tools else []), *(name for name in ("system", _ROW_ARGUMENTS) if name in there))
    named: list[Kind] = []
    if options.text_column:
        named.append(Kind("text", (options.text_column,)))
    if options.prompt_column or options.completion_column:
        pair = (options.prompt_column or "prompt", options.completion_column or "completion")
        named.append(Kind("completion", (*pair, *beside), tools))
    if options.messages_column:
        named.append(Kind("messages", (options.messages_column, *beside), tools))
    usual = [
        Kind("text", ("text",)),
        Kind("completion", ("prompt", "completion", *beside), tools),
        *(Kind("messages", (name, *beside), tools) for name in MESSAGE_COLUMNS),
        Kind("tokens", ("input_ids", *(name for name in given_masks.COLUMNS if name in there))),
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
    if kinds[0].name == "tokens":
        if unknown := [name for name in there if name in given_masks.NOT_SUPPORTED]:
            raise UserError(
                f"The column '{unknown[0]}' of {rows.origin.source} may say which ids have a loss, and is not read; "
                "give labels, completion_mask or loss_mask in its place, or remove the column."
            )
        return kinds[0]  # Ids say themselves where they end.
    beside_text = (name for name in endings.COLUMNS if name in there and name not in kinds[0].columns)
    return replace(kinds[0], endings=tuple(beside_text))


# ---- rows to ids and masks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowEncoder:
    """Makes one or more records of each row of a batch, in this or another process."""

    tokenizer: Any
    renderer: ChatRenderer
    kind: Kind
    options: CorpusOptions
    origin: Origin
    encoded: bool
    vocabulary_size: int
    features: dict[str, Any]  # of the columns that are not JSON
    special: re.Pattern[str] | None  # what the tokenizer reads as special tokens

    def __call__(self, batch: Any, indices: list[int]) -> pa.Table:
        names = self.kind.columns
        try:
            columns = decode_columns(batch, names, self.encoded, self.features)
            cut = [
                endings.was_cut(dict(zip(self.kind.endings, values, strict=True)), self.origin.where(row))
                for values, row in zip(self._endings(batch, len(indices)), indices, strict=True)
            ]
            rows = self._encode(indices, dict(zip(names, columns, strict=True)), cut)
            if self.options.head is not None:
                longest = self.options.max_length if self.options.overlong == "cut" else None
                refuse_beyond_head(
                    rows, indices, head=self.options.head, longest=longest, tokenizer=self.tokenizer, origin=self.origin
                )
        except RecursionError as error:
            raise UserError(
                f"A row is nested too deeply to be read, {self.origin.where(indices[0])} or one of the "
                f"{len(indices) - 1} after it; remove the row."
            ) from error
        rows = [self._without_end(row) if is_cut else row for row, is_cut in zip(rows, cut, strict=True)]
        pattern = None if self.kind.name == "tokens" else self.special
        special = [any(has_special_text(pattern, value) for value in row) for row in zip(*columns, strict=True)]
        return records(rows, special, self.options.max_length, self.options.overlong == "split")

    def _endings(self, batch: Any, count: int) -> Iterable[tuple[Any, ...]]:
        """For each row what its columns of endings say."""
        if not self.kind.endings:
            return [()] * count
        return zip(*decode_columns(batch, self.kind.endings, self.encoded, self.features), strict=True)

    def _without_end(self, row: EncodedRow) -> EncodedRow:
        """A row whose text was cut: no end token where it breaks off. A chat was rendered without one."""
        if row is None:
            return None
        if isinstance(row, list):
            return [*row[:-1], row[-1]._replace(unfinished=True)]
        ids, mask = endings.without_last_end(row.ids, row.mask, self.tokenizer.eos_token_id)
        return row._replace(ids=ids, mask=mask, unfinished=True)

    def _encode(self, indices: list[int], cells: Cells, cut: list[bool]) -> list[EncodedRow]:
        encode: Any = {
            "text": self._texts,
            "completion": self._completions,
            "messages": self._chats,
            "tokens": self._tokens,
        }[self.kind.name]
        return encode(indices, cells, cut)

    def _texts(self, indices: list[int], cells: Cells, cut: list[bool]) -> list[Encoded | None]:
        """Plain text: every position is trained."""
        values = cells[self.kind.columns[0]]
        texts = [self._text(value, row, 0) for value, row in zip(values, indices, strict=True)]
        full = [text for text in texts if text.strip()]
        encoded = iter(self._marked(full, [[(0, len(text))] for text in full]))
        return [next(encoded) if text.strip() else None for text in texts]

    def _completions(self, indices: list[int], cells: Cells, cut: list[bool]) -> list[EncodedRow]:
        """Encode prompts and completions; a row where one of them is a list of messages is a chat."""
        from stages.messages import is_chat_text, read_completion

        prompts, completions = (cells[name] for name in self.kind.columns[:2])
        results: list[EncodedRow] = [None] * len(indices)
        texts: list[str] = []
        spans: list[list[Span]] = []
        places: list[int] = []
        chats: dict[int, Chat] = {}
        for at, (prompt, completion, row) in enumerate(zip(prompts, completions, indices, strict=True)):
            if isinstance(prompt, list) or (is_chat_text(prompt) and is_chat_text(completion)):
                if completion:
                    chats[at] = read_completion(prompt, completion, self.origin.where(row))
                continue
            prompt, completion = self._text(prompt, row, 0), self._text(completion, row, 1)
            if self.tokenizer.bos_token:  # a beginning in the middle would get a loss
                completion = completion.removeprefix(str(self.tokenizer.bos_token))
            if completion.strip():
                self._refuse_beside_text(cells, at, row)
                texts.append(prompt + completion)
                spans.append([(len(prompt), len(prompt) + len(completion))])
                places.append(at)
        for at, encoded in zip(places, self._marked(texts, spans), strict=True):
            results[at] = encoded._replace(mask=endings.until_stop(encoded.ids, encoded.mask, self._stops))
        for at, sequences in self._rendered(chats, indices, cells, cut).items():
            results[at] = sequences
        return results

    def _refuse_beside_text(self, cells: Cells, at: int, row: int) -> None:
        """Raise UserError for tools or a system prompt beside a prompt that is text: no template would render them."""
        for name in self.kind.columns[2:]:
            if cells[name][at] not in (None, "", [], "[]"):
                raise UserError(
                    f"The column '{name}' of {self.origin.where(row)} stands beside a prompt that is text, which no "
                    "chat template renders; put it into the prompt, give the prompt as messages, or remove the column."
                )

    def _chats(self, indices: list[int], cells: Cells, cut: list[bool]) -> list[list[Encoded] | None]:
        from stages.messages import read_chat

        values = cells[self.kind.columns[0]]
        chats = {
            at: read_chat(value, self.origin.where(row))
            for at, (value, row) in enumerate(zip(values, indices, strict=True))
            if value is not None and value != [] and value != ""
        }
        rendered = self._rendered(chats, indices, cells, cut)
        return [rendered.get(at) for at in range(len(indices))]

    def _rendered(
        self, chats: Mapping[int, Chat], indices: list[int], cells: Cells, cut: list[bool]
    ) -> dict[int, list[Encoded]]:
        """Render and encode chats by their place in the batch; tools and system prompt may stand beside them."""
        from stages.messages import read_tools, with_system

        pieces: list[tuple[int, Rendered]] = []
        for at, chat in chats.items():
            where = self.origin.where(indices[at])
            tools = read_tools(cells[self.kind.tools][at], where) if self.kind.tools else None
            if "system" in cells:
                chat = with_system(chat, cells["system"][at], where)
            own = cells[_ROW_ARGUMENTS][at] if _ROW_ARGUMENTS in cells else None
            renderer = self.renderer.with_arguments(own, where)
            pieces += [(at, sequence) for sequence in renderer.render(chat, where, tools, unfinished=cut[at])]
        found: dict[int, list[Encoded]] = {at: [] for at in chats}
        encoded = self.renderer.encode([sequence for _, sequence in pieces])
        for (at, sequence), (ids, marks) in zip(pieces, encoded, strict=True):
            found[at].append(Encoded(ids, marks[1:], sequence.without_end, sequence.open_thoughts))
        return found

    def _tokens(self, indices: list[int], cells: Cells, cut: list[bool]) -> list[Encoded | None]:
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
        if value is None:
            return ""
        where = f"{self.origin.where(row)}, column '{self.kind.columns[column]}'"
        if not isinstance(value, str):
            kind = type(value).__name__
            if isinstance(value, dict) and set(value) == {UNSUPPORTED}:
                kind = str(value[UNSUPPORTED])
            raise UserError(f"The value in {where} is of type {kind}, not text; mend or remove the row.")
        check_text(value, where)
        return value

    def _marked(self, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
        """Ids of texts, and masks: position t is trained when token t+1 has a character in a span, or is the eos."""
        limit = self.options.max_length + 1 if self.options.overlong == "cut" else None
        if not texts:
            return []
        ending = self.options.append_eos
        encoded = encode_spans(self.tokenizer, texts, spans, add_special_tokens=True, ending=ending, limit=limit)
        return [self._with_eos(ids, marks) for ids, marks in encoded]

    @property
    def _stops(self) -> frozenset[int]:
        """The token ids that stop the teacher."""
        return frozenset({*self.options.end_ids, self.tokenizer.eos_token_id} - {None})

    def _with_eos(self, ids: np.ndarray, marks: np.ndarray) -> Encoded:
        """Ids that end in the end-of-sequence token, which has a loss, and the mask of their predictions.

        Text that was rendered before may end in another token that stops the teacher, and then gets no second end.
        """
        eos = self.tokenizer.eos_token_id
        if self.options.append_eos and eos is not None and not endings.ends(ids, self._stops, self.tokenizer):
            ids, marks = np.append(ids, np.int32(eos)), np.append(marks, True)
        return Encoded(ids, marks[1:])


def _integers(value: Any) -> np.ndarray | None:
    """int64 [L], or None when `value` is no flat list of whole numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iu" else None
