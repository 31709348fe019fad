"""Find the places to cut a long text so that the ids on both sides are those of the whole.

A tokenizer changes the text (its normalizer), cuts it into pieces (its pre-tokenizer) and encodes each piece alone (its
model). A cut is safe where neither of the first two looks across it, and where a piece begins; also between two
characters that no token of a BPE model holds side by side, for then no merge leads across.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from stages.regex_reach import NotUnderstood, Reach, literal

# Characters around a cut in which another one is looked for, and that are read beyond that.
_WINDOW = 256
_BEYOND = 8

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Steps that look at one character, or at those which compose one with it.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled"}
_LOCAL_NORMALIZERS |= {"ByteLevel", "Prepend"}
_LOCAL_SPLITS = {"WhitespaceSplit", "BertPreTokenizer", "Punctuation", "Digits", "CharDelimiterSplit"}
# Text of each tokenizer's vocabulary, with a separator that no token holds.
_VOCABULARIES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_Between = Callable[[str, str], bool]  # True: the step may look across from one character to the next


class Seams:
    """The safe cuts of texts for one tokenizer with a backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self._splitter = backend.pre_tokenizer
        self._added = np.array(sorted(getattr(tokenizer, "added_tokens_decoder", {})), dtype=np.int64)
        try:
            self._normalizers = [_normalizer(step) for step in _steps(backend.normalizer, "normalizers")]
            self._splits = _splits(_steps(backend.pre_tokenizer, "pretokenizers"))
            self.known = True
        except NotUnderstood:
            self.known = False
        model = backend.model
        self._merges = type(model).__name__ == "BPE" and not any(
            (model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix)
        )

    def safe(self, text: str, at: int, ids: np.ndarray, starts: np.ndarray, place: int) -> bool:
        """Return True where `text` may be cut before character `at`, the beginning of token `place`.

        ids, starts: the tokens of the text up to beyond `at`, int32 and int64 [T].
        """
        if not self.known or not self._is_apart(text, at):
            return False
        return self._begins_piece(text, at, ids, starts) or (self._merges and self._is_unmerged(ids, place))

    def _is_apart(self, text: str, at: int) -> bool:
        """Return True where neither the normalizer nor the pre-tokenizer looks across the cut."""
        if not 0 < at < len(text) or (unicodedata.category(text[at])[0] in "MC" and text[at] not in "\t\n\r"):
            return False
        if not any(not character.isalpha() for character in text[at - 1 : at + 1]):
            return False  # letters compose, and fold, with one another
        before, behind = text[max(0, at - _BEYOND) : at], text[at : at + _BEYOND]
        for normalize, across in self._normalizers:
            if across(before[-1], behind[0]):
                return False
            whole, part = normalize(before + behind), normalize(before)
            if not part or not whole.startswith(part) or len(whole) == len(part):
                return False
            before, behind = part, whole[len(part) :]
        return not any(across(before[-1], behind[0]) for across in self._splits)

    def _begins_piece(self, text: str, at: int, ids: np.ndarray, starts: np.ndarray) -> bool:
        """Return True where the pre-tokenizer cuts before `at`, in text between two other cuts."""
        if self._splitter is None:
            return False
        low = next((place for place in range(at - 1, max(0, at - _WINDOW), -1) if self._is_apart(text, place)), None)
        high = next((place for place in range(at + 1, at + _WINDOW) if self._is_apart(text, place)), None)
        if low is None or high is None:
            return False
        low, high = max(0, low - _BEYOND), high + _BEYOND
        inside = ids[max(0, np.searchsorted(starts, low) - 1) : np.searchsorted(starts, high)]
        if starts[0] > low or starts[-1] < high or np.isin(inside, self._added).any():
            return False  # an added token ends the text before it, which the pre-tokenizer cannot know
        pieces = _pieces(self._tokenizer.backend_tokenizer, text[low:high])
        cut = at - low
        return any(end <= cut for _, end in pieces) and not any(start < cut < end for start, end in pieces)

    def _is_unmerged(self, ids: np.ndarray, place: int) -> bool:
        """Return True where no token of the vocabulary holds the characters beside the cut side by side."""
        if np.isin(ids[place - 1 : place + 1], self._added).any():
            return False
        left, right = map(str, self._tokenizer.convert_ids_to_tokens(ids[place - 1 : place + 1].tolist()))
        unknown = getattr(self._tokenizer.backend_tokenizer.model, "unk_token", None)
        if any(not token or token == unknown or _BYTE.fullmatch(token) for token in (left, right)):
            return False
        if self._tokenizer not in _VOCABULARIES:
            _VOCABULARIES[self._tokenizer] = "\n\0".join(self._tokenizer.get_vocab())
        return left[-1] + right[0] not in _VOCABULARIES[self._tokenizer]


def _pieces(backend: Any, text: str) -> list[tuple[int, int]]:
    """The pieces of the text that the model would encode, as characters."""
    from tokenizers import PreTokenizedString

    held = PreTokenizedString(text)
    if backend.normalizer is not None:
        held.normalize(lambda part: backend.normalizer.normalize(part))
    backend.pre_tokenizer.pre_tokenize(held)
    return [offsets for _, offsets, _ in held.get_splits("original", "char")]


# ---- the steps of a normalizer and of a pre-tokenizer ------------------------------------------------------


def _steps(part: Any, nested: str) -> list[dict[str, Any]]:
    """Return what the part does, one step after another. Raises NotUnderstood for one that is written in Python."""
    if part is None:
        return []
    try:
        stated = json.loads(part.__getstate__())
    except Exception as error:  # of the backend, which has no type of its own
        raise NotUnderstood(str(part)) from error
    left, steps = [stated], []
    while left:
        step = left.pop(0)
        if step["type"] == "Sequence":
            left = step[nested] + left
        else:
            steps.append(step)
    return steps


def _never(_before: str, _behind: str) -> bool:
    return False


def _across(pattern: dict[str, str]) -> _Between:
    """Return whether a match of the pattern holds two characters side by side."""
    reach = Reach(pattern["Regex"]) if "Regex" in pattern else literal(pattern["String"])
    return lambda before, behind: reach.crosses(before, behind, _matches)


def _matches(atom: str, character: str) -> bool:
    """Return whether the backend's regex engine matches the character."""
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(atom), "").normalize_str(character) == ""


def _normalizer(step: dict[str, Any]) -> tuple[Callable[[str], str], _Between]:
    """Return what the step does to a text, and where it looks across. Raises NotUnderstood."""
    from tokenizers import Regex, normalizers

    name = step["type"]
    if name == "Strip":  # it acts on the ends only
        return (lambda text: text), _never
    if name == "Replace":
        pattern = step["pattern"]
        given = Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"]
        return normalizers.Replace(given, step["content"]).normalize_str, _across(pattern)
    if name not in _LOCAL_NORMALIZERS:
        raise NotUnderstood(name)
    own: Any = normalizers.Sequence([])
    own.__setstate__(json.dumps({"type": "Sequence", "normalizers": [step]}).encode())
    return own.normalize_str, _never


def _splits(steps: list[dict[str, Any]]) -> list[_Between]:
    """Return where each step looks across. Raises NotUnderstood, also for a step that reads text which one changed."""
    found: list[_Between] = []
    changed = False
    for step in steps:
        name = step["type"]
        if changed or name not in {*_LOCAL_SPLITS, "Split", "ByteLevel", "Metaspace", "Whitespace"}:
            raise NotUnderstood(name)
        changed = name in ("ByteLevel", "Metaspace")
        if name == "Split":
            found.append(_across(step["pattern"]))
        elif name == "ByteLevel" and step.get("use_regex", True):
            found.append(_across({"Regex": _GPT2}))
        elif name == "Whitespace":
            found.append(lambda before, behind: not (before.isspace() or behind.isspace()))
        else:
            found.append(_never)
    return found
