"""The generated pages are what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

from pipeline import cli

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_in_the_tree_are_fresh(generate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.run(["--check"]) == 0, capsys.readouterr().err


def test_every_command_and_option_is_in_the_reference(generate: ModuleType) -> None:
    page = generate.cli_markdown()
    root = click.Context(cli.main, info_name="pipeline")
    for name in cli.COMMANDS:
        section = page.split(f"\n## pipeline {name}\n")[1].split("\n## ")[0]
        command = cli.main.get_command(root, name)
        assert command is not None
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden and "--debug" not in param.opts:
                assert f"`{param.opts[0]}`" in section, f"{name} {param.opts[0]}"


def test_check_names_the_stale_file(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, stale, missing = (tmp_path / name for name in ("fresh.md", "stale.md", "missing.md"))
    fresh.write_text("text", encoding="utf-8")
    stale.write_text("old", encoding="utf-8")
    monkeypatch.setattr(generate, "pages", lambda: dict.fromkeys((fresh, stale, missing), "text"))
    assert generate.run(["--check"]) == 1
    captured = capsys.readouterr()
    assert "stale.md is stale" in captured.err
    assert "missing.md is stale" in captured.err
    assert "fresh.md" not in captured.err
    assert not missing.exists()
    assert generate.run([]) == 0
    assert stale.read_text(encoding="utf-8") == missing.read_text(encoding="utf-8") == "text"
    assert generate.run(["--check"]) == 0


def test_help_text_becomes_markdown(generate: ModuleType) -> None:
    text = "First line\n  goes on.\n\n\b\nExample:\n  pipeline x \\\n      --y 1\n\nLast.\f not shown"
    assert generate._markdown_help(text) == (
        "First line\ngoes on.\n\nExample:\n\n```text\npipeline x \\\n    --y 1\n```\n\nLast."
    )


def test_options_become_rows(generate: ModuleType) -> None:
    @click.command()
    @click.option("--size", type=click.IntRange(1), default=4, show_default=True, help="Rows | of <one> shard.")
    @click.option("--kind", type=click.Choice(["a", "b"]), multiple=True, help="Kinds.")
    @click.option("--resume/--fresh", default=True, show_default=True, help="Go on.")
    @click.option("--rows", type=float, show_default="all", help="How many.")
    @click.option("--out", required=True, help="Where.")
    @click.option("--quiet", is_flag=True, help="Less.")
    def command() -> None:
        pass

    rows = generate._options_table(command, click.Context(command), ("--help",)).splitlines()
    assert rows[2:] == [
        "| `--size` | Rows \\| of &lt;one> shard. | integer, x>=1 | 4 |",
        "| `--kind` | Kinds. | [a\\|b], repeatable |  |",
        "| `--resume`, `--fresh` | Go on. | flag | resume |",
        "| `--rows` | How many. | number | all |",
        "| `--out` | Where. | TEXT | required |",
        "| `--quiet` | Less. | flag | off |",
    ]
