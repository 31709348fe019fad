"""Settings of the chat template: a file in its place, its variables, and the time that it is told.

Templates may write today's date. A cache is resumed only if its corpus is the same, so the moment is fixed when the
cache is begun and stands in its manifest: a template is told that moment from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from stages.chat_template import check_template, tells_time
from storage.errors import UserError
from storage.json_text import parse_json
from storage.manifest import peek_section
from storage.places import Place

TIME, ARGUMENTS, TEMPLATE = "template_time", "template_arguments", "chat_template"
_LONGEST_TEMPLATE = 1 << 20  # bytes; the longest that are published have 30,000


@dataclass(frozen=True)
class ChatSettings:
    """template: a file with a Jinja chat template in place of the tokenizer's own. arguments: variables for it; text is
    read as JSON where it can be. time: ISO 8601, e.g. 2026-11-26; None for today.
    """

    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    time: str | None = None

    def values(self) -> dict[str, Any]:
        """Return the arguments as the template gets them."""
        return {name: _value(text) if isinstance(text, str) else text for name, text in self.arguments.items()}

    def prepare(self, tokenizer: Any) -> None:
        """Give the tokenizer the template of the file. Raises UserError for a file or arguments that cannot be used."""
        if self.template is not None:
            tokenizer.chat_template = _read_template(Path(self.template).expanduser())
        if self.time is not None:
            _moment(self.time)
        if self.arguments and not getattr(tokenizer, "chat_template", None):
            raise UserError("Template arguments are given, but the tokenizer has no chat template; leave them out.")
        check_template(tokenizer, self.arguments)

    def moment(self, tokenizer: Any, begun: str | None = None) -> datetime | None:
        """Return the time to tell the template, None for a template that tells no time: the given one, else that of the
        work begun before (`begun`), else the start of this day. Raises UserError where both are there and differ.
        """
        if not tells_time(tokenizer):
            return None
        if begun is not None and self.time is not None and _moment(begun) != _moment(self.time):
            raise UserError(
                f"The template time is {self.time}, but this output was begun with {begun}; leave the option out, or "
                "name another output."
            )
        given = begun or self.time
        # A day, not a moment: workers that begin one cache together agree on it.
        return _moment(given) if given else datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)

    def about(self, moment: datetime | None) -> dict[str, Any]:
        """Return what a manifest tells of these settings; they act on the corpus, whose fingerprint is the identity."""
        said = {
            TIME: None if moment is None else moment.isoformat(),
            ARGUMENTS: self.values() or None,
            TEMPLATE: None if self.template is None else Path(self.template).name,
        }
        return {name: value for name, value in said.items() if value is not None}


def time_there(output: Place) -> str | None:
    """Return the template time of the cache that was begun at this place; None where there is none."""
    found = peek_section(output, "source").get(TIME)
    return found if isinstance(found, str) else None


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"The template time {text!r} is no date; write it as 2026-11-26 or 2026-11-26T08:30.") from None


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return parse_json(text)
    except ValueError:
        return text


def _read_template(path: Path) -> str:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        if path.stat().st_size > _LONGEST_TEMPLATE:
            raise UserError(f"{path} is too large to be a chat template; name another file.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path} cannot be read as a chat template ({reason}); name another file.") from None
    if not text.strip():
        raise UserError(f"{path} is empty and no chat template; name another file.")
    try:
        _compile_jinja_template(text)
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"{path}{line} is not a valid chat template: {error}; mend the file.") from None
    return text.rstrip("\n")
