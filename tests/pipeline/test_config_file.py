"""Options from a file: what wins, what is refused, and that values mean what they mean when typed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest

from pipeline import cli
from pipeline.config_file import config_option, key_value_option, parse_value


class Recorder:
    """A throwaway command that keeps what it was called with."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

        @click.command("cache")
        @config_option(nested=("engine",))
        @click.option("--top-n", type=click.IntRange(1), default=64, show_default=True, help="Entries.")
        @click.option("--temperature", "temperatures", type=float, multiple=True, help="Temperatures.")
        @click.option("--range", "span", type=int, nargs=2, help="Rows.")
        @click.option("--pair", "pairs", type=(str, int), multiple=True, help="Pairs.")
        @click.option("--name", help="A text.")
        @click.option("--resume/--fresh", default=True, help="Go on.")
        @click.option("--trust", is_flag=True, help="A flag.")
        @click.option("--kind", type=click.Choice(["kl", "atkd"]), default="kl", help="Objective.")
        @click.option("--corpus", type=click.Path(exists=True), required=True, help="A file.")
        @click.option("--even", type=int, callback=self._even, help="An even number.")
        @key_value_option("--trainer", help="Arguments of the trainer.")
        def command(**values: Any) -> None:
            self.values = values

        self.group = cli.LazyGroup("pipeline")
        self.group.add_command(command)

    @staticmethod
    def _even(_ctx: click.Context, _param: click.Parameter, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise click.BadParameter("must be even")
        return value

    def run(self, *args: str) -> int:
        return cli.run(["cache", *args], self.group)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        os.environ.pop(cli.DEBUG_VARIABLE, None)
        yield


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write run.yaml into the working directory, next to a corpus that exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").touch()

    def write_text(text: str) -> None:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")

    return write_text


def test_the_file_fills_options_and_the_command_line_wins(recorder: Recorder, write: Any) -> None:
    write(
        "corpus: data.jsonl\ntop-n: 5\ntemperature: [2, 0.5]\nrange: [3, 4]\npair: [[a, 1], [b, 2]]\n"
        "name: 007\nresume: no\ntrust: true\nkind: atkd\n"
    )
    assert recorder.run("--config", "run.yaml", "--kind", "kl") == 0
    assert recorder.values == {
        "corpus": "data.jsonl",
        "top_n": 5,
        "temperatures": (2.0, 0.5),
        "span": (3, 4),
        "pairs": (("a", 1), ("b", 2)),
        "name": "007",
        "resume": False,
        "trust": True,
        "kind": "kl",
        "even": None,
        "trainer": {},
        "engine": {},
    }


@pytest.mark.parametrize("before", [True, False])
def test_order_on_the_command_line_does_not_matter(recorder: Recorder, write: Any, before: bool) -> None:
    write("corpus: data.jsonl\ntop_n: 5\n")
    config, given = ["--config", "run.yaml"], ["--top-n", "7"]
    assert recorder.run(*(config + given if before else given + config)) == 0
    assert recorder.values["top_n"] == 7


@pytest.mark.parametrize("text", ["", "# nothing\n", "top_n:\nname: null\n", "---\n"])
def test_empty_values_leave_the_defaults(recorder: Recorder, write: Any, text: str) -> None:
    write(text)
    assert recorder.run("--config", "run.yaml", "--corpus", "data.jsonl") == 0
    assert recorder.values["top_n"] == 64
    assert recorder.values["name"] is None


@pytest.mark.parametrize("key", ["temperature", "temperatures", "TEMPERATURE"])
def test_names_of_an_option(recorder: Recorder, write: Any, key: str) -> None:
    """By its flag or by its parameter name, and one value stands for a list of one."""
    write(f"corpus: data.jsonl\n{key}: 2\n")
    code = recorder.run("--config", "run.yaml")
    assert code == (2 if key.isupper() else 0)
    if not code:
        assert recorder.values["temperatures"] == (2.0,)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("top-m: 5", "run.yaml, line 1, key top-m: cache has no such option; did you mean 'top-n'?"),
        ("zzzzzz: 5", "run.yaml, line 1, key zzzzzz: cache has no such option; cache --help lists the names"),
        ("config: x", "run.yaml, line 1, key config: cache has no such option; "),
        ("\ntop_n: abc", "run.yaml, line 2, key top_n: 'abc' is not a valid integer"),
        ("top_n: 3.7", "run.yaml, line 1, key top_n: '3.7' is not a valid integer"),
        ("top_n: true", "run.yaml, line 1, key top_n: 'true' is not a valid integer"),
        ("top_n: 0", "run.yaml, line 1, key top_n: 0 is not in the range x>=1"),
        ("top_n: [1]", "run.yaml, line 1, key top_n: takes one value, found a sequence"),
        ("top_n: {a: 1}", "run.yaml, line 1, key top_n: takes one value, found a mapping"),
        ("resume: maybe", "run.yaml, line 1, key resume: 'maybe' is not a valid boolean"),
        ("kind: klx", "run.yaml, line 1, key kind: 'klx' is not one of 'kl', 'atkd'"),
        ("temperature: [1, hot]", "run.yaml, line 1, key temperature: 'hot' is not a valid float"),
        ("range: 3", "run.yaml, line 1, key range: takes a list of 2 values, found a scalar"),
        ("range: [3]", "run.yaml, line 1, key range: Takes 2 values but 1 was given"),
        ("even: 3", "run.yaml: Invalid value for '--even': must be even (see 'pipeline cache --help')"),
        ("top_n: 5\ntop_n: 6", "run.yaml, line 2: key top_n occurs twice; keep one of them"),
        ("top_n: 5\ntop-n: 6", "run.yaml, line 2, key top-n: the same option is already set as 'top_n'"),
        ("- 5", "run.yaml: expected `key: value` lines, found a sequence"),
        ("[a]: 5", "run.yaml, line 1: a key must be a word, found a sequence"),
        ("top_n: [5", "run.yaml is not valid YAML, line 1, column 10: "),
        ("a: 1\n---\nb: 2", "run.yaml is not valid YAML, line 2, column 1: "),
        ("trainer: 5", "run.yaml, line 1, key trainer: expected `key: value` lines, found a scalar"),
        ("trainer:\n  x: !!python/name:os.system", "run.yaml is not valid YAML, line 2, column 6: the tag "),
        ("engine: [a]", "run.yaml, line 1, key engine: expected `key: value` lines, found a sequence"),
        ("[" * 3000, "run.yaml is not valid YAML, "),
    ],
)
def test_a_bad_file_is_one_sentence(
    recorder: Recorder, write: Any, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    write(text)
    corpus = ["--corpus", "data.jsonl"]
    assert recorder.run(*corpus, "--config", "run.yaml") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {sentence}"), captured.err
    assert len(captured.err.splitlines()) == 1
    assert recorder.values == {}


def test_a_file_that_is_not_there_or_not_text(
    recorder: Recorder, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write("")
    assert recorder.run("--config", "nowhere.yaml") == 2
    assert "'nowhere.yaml' does not exist" in capsys.readouterr().err
    Path("run.yaml").write_bytes(b"name: \xff\n")
    assert recorder.run("--config", "run.yaml") == 2
    assert capsys.readouterr().err == "error: run.yaml is not UTF-8 text, at byte 6\n"


def test_a_value_that_the_command_line_replaces_is_not_checked(recorder: Recorder, write: Any) -> None:
    """A file written elsewhere may name a path that does not exist here."""
    write("corpus: /nowhere/else.jsonl\n")
    assert recorder.run("--config", "run.yaml") == 2
    assert recorder.run("--config", "run.yaml", "--corpus", "data.jsonl") == 0


def test_a_required_option_may_come_from_the_file(
    recorder: Recorder, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write("top_n: 5\n")
    assert recorder.run("--config", "run.yaml") == 2
    assert "Missing option '--corpus'" in capsys.readouterr().err


def test_help_after_a_file_shows_its_values(recorder: Recorder, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write("top_n: 5\n")
    assert recorder.run("--config", "run.yaml", "--help") == 0
    assert "[default: 5;" in " ".join(capsys.readouterr().out.split())


def test_mappings_merge_and_the_command_line_wins(recorder: Recorder, write: Any) -> None:
    write(
        "corpus: data.jsonl\ntrainer:\n  learning-rate: 3e-4\n  save_strategy: no\n  max_steps: 10\n"
        "  lr_scheduler_kwargs: {min_lr: 1e-6}\nengine:\n  tensor_parallel_size: 8\n"
    )
    assert recorder.run("--config", "run.yaml", "--trainer", "max_steps=20", "--trainer", "bf16=true") == 0
    assert recorder.values["trainer"] == {
        "learning_rate": 3e-4,
        "save_strategy": "no",
        "max_steps": 20,
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "bf16": True,
    }
    assert recorder.values["engine"] == {"tensor_parallel_size": 8}


def test_pairs_without_a_file(recorder: Recorder, write: Any) -> None:
    write("")
    args = ["--trainer", "learning-rate=3e-4", "--trainer", "learning_rate=1e-4", "--trainer", "run=a=b"]
    assert recorder.run("--corpus", "data.jsonl", *args) == 0
    assert recorder.values["trainer"] == {"learning_rate": 1e-4, "run": "a=b"}


@pytest.mark.parametrize("pair", ["learning_rate", "=5", "a b=5", "x=[1", "x='a", "x=!!python/name:os.system"])
def test_a_bad_pair_is_one_sentence(
    recorder: Recorder, write: Any, capsys: pytest.CaptureFixture[str], pair: str
) -> None:
    write("")
    code = recorder.run("--corpus", "data.jsonl", "--trainer", pair)
    captured = capsys.readouterr()
    if pair.startswith("x=!!"):
        assert (code, recorder.values["trainer"]) == (0, {"x": "!!python/name:os.system"})
        return
    assert code == 2
    assert captured.err.startswith("error: Invalid value for '--trainer': ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5e+3", -2500.0),
        ("8", 8),
        ("-8", -8),
        ("0", 0),
        ("0x10", 16),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        (".", "."),
        ("-", "-"),
        ("#1", "#1"),
        ("*.txt", "*.txt"),
        ("@x", "@x"),
        ("a: b", "a: b"),
        ("cosine", "cosine"),
        ("'8'", "8"),
        ('"true"', "true"),
        ("[q_proj, 3e-4, no]", ["q_proj", 3e-4, "no"]),
        ("{min_lr: 1e-6}", {"min_lr": 1e-6}),
    ],
)
def test_values_of_pairs(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)
