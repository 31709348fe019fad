"""Options from a file: `--config run.yaml` holds what one would type, and the command line beats it.

A value is taken as the text written in the file and converted by the option's own click type, so a file
and a command line can never mean different things. Mappings (`trainer:`) belong to options that take
`KEY=VALUE` pairs; their values are read by YAML 1.2's rules, where `3e-4` is a number and `no` is a word
(YAML 1.1, which PyYAML speaks by default, has it the other way round).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click
import yaml

from pipeline.cli import CONFIG_META
from pipeline.config_rules import pair_typed_alone, typed_alone
from storage.errors import UserError

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any] | click.Command)

_MAPPINGS_META = "pipeline.config_mappings"
# More than any list of options.
_MAX_BYTES = 1 << 20
_NULL = "tag:yaml.org,2002:null"
_NO_TEXT = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Safe YAML whose plain words are typed by the core schema of YAML 1.2.

    Without aliases: a few of them stand for more than a machine can hold. Without tags: a value has one form.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor} is not taken; write the value itself"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag[:60]} is not taken; write the value alone"
        elif isinstance(event, yaml.ScalarEvent) and _NO_TEXT.search(event.value):
            problem = "half a character (\\ud800 to \\udfff), which no text has; write the character itself"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Longer ones are no numbers of ours, and Python neither reads nor shows them all.
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,39})|0x[0-9a-fA-F]{1,32}", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?=.*[.eE])(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _one_line(error: Exception) -> str:
    """What the YAML parser found, and where in the text."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    return " ".join(str(error).split()) or type(error).__name__


def parse_value(text: str) -> Any:
    """The value of a `KEY=VALUE` pair: a YAML scalar, or a list or mapping in brackets. Raises ValueError."""
    text = text.strip()
    try:
        if text[:1] in ("[", "{", '"', "'"):
            return yaml.load(text, Loader=_Loader)
        # Not parsed as a document: `#1`, `*.txt` and `a: b` are plain words here.
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error


def _pair(argument: str) -> tuple[str, Any]:
    """`KEY=VALUE` as a name and a YAML value. Dashes in the name are underscores."""
    key, equals, text = argument.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key.isidentifier():
        raise click.BadParameter(f"{argument!r} is not a KEY=VALUE pair such as learning_rate=3e-4")
    try:
        return key, parse_value(text)
    except ValueError as error:
        raise click.BadParameter(f"the value of {key!r} is not YAML: {error}") from error


class KeyValueOption(click.Option):
    """An option of `KEY=VALUE` pairs; a class of its own so that `--config` knows to give it a mapping."""


def key_value_option(*declarations: str, help: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    """An option repeated as `--name KEY=VALUE` that the command receives as one dict.

    In a configuration file it is a mapping under the option's name; pairs of the command line win over it.
    """

    def merge(ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return {**ctx.meta.get(_MAPPINGS_META, {}).get(param.name, {}), **dict(pairs)}

    attributes.setdefault("show_default", "none")
    return click.option(
        *declarations,
        cls=KeyValueOption,
        type=_pair,
        multiple=True,
        metavar="KEY=VALUE",
        callback=merge,
        help=help,
        **attributes,
    )


def config_option(*, nested: Sequence[str] = ()) -> Callable[[_Decorated], _Decorated]:
    """The option `--config FILE.yaml` of a command, whose keys are the names of its options.

    nested: names of mappings that are no option of the command, each handed to it as a dict (empty where
    absent). Options made by `key_value_option` take a mapping without being listed.
    """

    def fill(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
        mappings: dict[str, dict[str, Any]] = {}
        if path is not None:
            ctx.meta[CONFIG_META] = str(path)
            values, mappings = _read(path, ctx.command, nested)
            ctx.default_map = {**(ctx.default_map or {}), **values}
        ctx.meta[_MAPPINGS_META] = mappings
        for name in set(nested) - {param.name for param in ctx.command.params}:
            ctx.params[name] = mappings.get(name, {})

    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=fill,
        show_default="none",
        help="YAML file with options of this command by name, e.g. `seed: 1`; the command line wins.",
    )


@dataclass(frozen=True)
class _FileValue:
    """A value of the file, converted when click asks for it, which it does only if the command line has none.

    So a file may name a path that does not exist here as long as the command line replaces it.
    """

    where: str
    param: click.Parameter
    value: Any

    def __call__(self) -> Any:
        try:
            self.param.type_cast_value(click.get_current_context(), self.value)
        except click.BadParameter as error:
            raise UserError(f"{self.where}: {error.message.rstrip('.')[:400]}") from error
        return self.value

    def __str__(self) -> str:
        """Shown as the default by `--config FILE --help`."""
        return self.value if isinstance(self.value, str) else ", ".join(map(str, self.value))


def _read(
    path: Path, command: click.Command, nested: Sequence[str]
) -> tuple[dict[str, _FileValue], dict[str, dict[str, Any]]]:
    """The values of a configuration file for click's default map, and its mappings."""
    names = _known_names(command, nested)
    values: dict[str, _FileValue] = {}
    mappings: dict[str, dict[str, Any]] = {}
    seen: dict[str, str] = {}
    for key, node in _pairs(_parse(path), str(path)):
        where = f"{path}, line {node.start_mark.line + 1}, key {key}"
        name = names.get(key.replace("_", "-"))
        if name is None:
            close = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"{command.name} --help lists the names"
            raise UserError(f"{where}: {command.name} has no such option; {hint}")
        if name in seen:
            raise UserError(f"{where}: the same option is already set as {seen[name]!r}; keep one of them")
        seen[name] = key
        if node.tag == _NULL:
            continue  # An empty value leaves the option's default.
        param = next((param for param in command.params if param.name == name), None)
        if param is None or isinstance(param, KeyValueOption):
            mappings[name] = _mapping(node, where)
            if param is not None:
                for each, value in mappings[name].items():
                    _check_may_set(f"{where}, {each}", pair_typed_alone(_longest(param), each, value))
        else:
            values[name] = _FileValue(where, param, _texts(node, param, where))
            _check_may_set(where, typed_alone(_longest(param), values[name].value))
    return values, mappings


def _check_may_set(where: str, why_not: str | None) -> None:
    if why_not is not None:
        raise UserError(f"{where}: {why_not}, so it is taken on the command line alone")


def _longest(param: click.Parameter) -> str:
    return max(param.opts, key=len).lstrip("-")


def _known_names(command: click.Command, nested: Sequence[str]) -> dict[str, str]:
    """Every spelling of a key (with dashes) and the parameter it means."""
    names = {name.replace("_", "-"): name for name in nested}
    for param in command.params:
        if param.name is None or not param.expose_value:
            continue
        for spelling in (param.name, *(opt for opt in param.opts if opt.startswith("--"))):
            names[spelling.lstrip("-").replace("_", "-")] = param.name
    return names


def _parse(path: Path) -> yaml.Node | None:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # A device may have no end.
        if len(raw) > _MAX_BYTES:
            raise UserError(f"{path} is longer than {_MAX_BYTES} bytes, too long for a list of options")
        text = raw.decode("utf-8")
        return yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML, {_one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text, at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _pairs(node: yaml.Node | None, where: str) -> list[tuple[str, yaml.Node]]:
    """The entries of a mapping, its keys checked to be words that occur once."""
    if node is None or node.tag == _NULL:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: expected `key: value` lines, found a {node.id}")
    pairs: dict[str, yaml.Node] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}, line {line}: a key must be a word, found a {key.id}")
        if key.value in pairs:
            raise UserError(f"{where}, line {line}: key {key.value} occurs twice; keep one of them")
        pairs[key.value] = value
    return list(pairs.items())


def _mapping(node: yaml.Node, where: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in _pairs(node, where):
        try:
            result[key.replace("-", "_")] = _Loader("").construct_object(value, deep=True)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{where}, {key}: {_one_line(error)}") from error
    return result


def _texts(node: yaml.Node, param: click.Parameter, where: str) -> Any:
    """The value as a command line would hold it: a text, or lists of texts for options that take several."""
    if param.multiple:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [_text_or_texts(item, param.nargs, where) for item in items]
    return _text_or_texts(node, param.nargs, where)


def _text_or_texts(node: yaml.Node, nargs: int, where: str) -> str | list[str]:
    scalars = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if any(isinstance(each, yaml.ScalarNode) and "\0" in each.value for each in scalars):
        raise UserError(f"{where}: holds a null character, which no name can hold; remove it")
    if nargs == 1:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        raise UserError(f"{where}: takes one value, found a {node.id}")
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [str(item.value) for item in node.value]
    raise UserError(f"{where}: takes a list of {'values' if nargs < 0 else f'{nargs} values'}, found a {node.id}")
