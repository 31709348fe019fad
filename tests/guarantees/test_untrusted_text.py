"""Text of somebody else steers no terminal and no page, and secrets reach neither: each attack is run."""

from __future__ import annotations

import ast
import itertools
import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.streams import say
from stages.card import card
from stages.summary import summarize
from storage.cache import Cache
from storage.redact import holds_secret, without_secrets
from tests.conftest import Tiny
from tests.storage.synthetic import make_manifest

ROOT = Path(__file__).resolve().parents[2]
STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u200b\u2066\udc80\r\b"


# ---- terminals --------------------------------------------------------------------------------------------------


def test_commands_write_through_one_function() -> None:
    """So that no text can pass by it."""
    found = []
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "click.secho", "print", "secho"):
                found.append(f"{path.name}:{node.lineno}")
    assert len(found) == 1 and found[0].startswith("streams.py"), found


def test_nothing_that_steers_gets_through(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a {STEERING} b", err=True)
    said = capsys.readouterr().err
    assert said.endswith(" b\n") and all(char.isprintable() or char == "\n" for char in said)


def poisoned(cache_path: Path, target: Path, **teacher: str) -> Path:
    """A cache whose manifest holds text of somebody else; its receipts go with it, so that it is opened."""
    shutil.copytree(cache_path, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["source"] |= {"dataset": f"data{STEERING}", "split": STEERING, "limit": STEERING}
    manifest["made_with"] |= {f"torch{STEERING}": STEERING}
    manifest["teacher"] |= teacher
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize("debug", [False, True])
def test_a_cache_steers_no_terminal(
    debug: bool, cache_path: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    cache = poisoned(cache_path, tmp_path / "cache", name=f"teacher{STEERING}")
    flags = ["--debug"] if debug else []
    for words in (
        ["inspect", cache], ["verify", cache], ["bundle", cache, tmp_path / "b.tar.zst"],
        ["train-student", "--student", tiny.student, "--shards", cache, "--output", tmp_path / "o", "--max-steps", 1],
        ["merge", cache, cache_path, "--output", tmp_path / "m"],
    ):  # fmt: skip
        ended = pipeline(*flags, *words)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b\u2066\udc80]", _lines(ended.out + ended.err)), (
            words
        )


def _lines(text: str) -> str:
    # What the libraries of models draw while they load.
    return "\n".join(
        line for line in text.splitlines() if "Loading weights" not in line and "Writing model" not in line
    )


# ---- pages ------------------------------------------------------------------------------------------------------

MARKUP = (
    "`</code><script>alert(1)</script>`", "[click](javascript:alert(1))", "![x](https://evil.example/pixel.png)",
    "<img src=x onerror=alert(1)>", "| a | b |\n| --- | --- |", "# heading\n\n---\nlicense: mit", "https://evil.example",
    "www.evil.example", "@everyone", "*bold* _it_ ~~no~~ $x$", "a\u202eb", "\x1b[31m",
)  # fmt: skip


@pytest.mark.parametrize("markup", MARKUP)
def test_a_card_is_no_page_of_somebody_else(markup: str, cache_path: Path) -> None:
    cache = Cache.open(str(cache_path))
    manifest = cache.manifest
    fields = {"name": markup, "revision": markup, "architecture": markup, "weights": markup}
    cache.manifest = manifest.model_copy(
        update={
            "teacher": manifest.teacher.model_copy(update=fields),
            "scoring": manifest.scoring.model_copy(update={"dtype": markup, "engine": markup}),
            "corpus": manifest.corpus.model_copy(update={"fingerprint": markup}),
            "source": dict.fromkeys(("dataset", "split", "limit", "license", "citation"), markup),
            "made_with": {markup: markup, "engine": markup},
        }
    )
    plain = Cache.open(str(cache_path))
    plain.manifest = cache.manifest.model_copy(
        update={
            "teacher": manifest.teacher.model_copy(update=dict.fromkeys(fields, "x")),
            "scoring": manifest.scoring.model_copy(update={"dtype": "x", "engine": "x"}),
            "corpus": manifest.corpus.model_copy(update={"fingerprint": "x"}),
            "source": dict.fromkeys(("dataset", "split", "limit", "license", "citation"), "x"),
            "made_with": {"x": "x", "engine": "x"},
        }
    )
    numbers = summarize(Cache.open(str(cache_path)))
    text, expected = card(cache, numbers), card(plain, numbers)
    front, body = text.split("\n---\n", 1)
    assert yaml.safe_load(front)["pretty_name"].endswith(markup)
    assert {*yaml.safe_load(front)} == {*yaml.safe_load(expected.split("\n---\n", 1)[0])}
    # As many lines, rows and cells as with harmless text, but for the citation in its block.
    start = body.index("```text\n")
    assert body[:start].count("\n") == expected.split("\n---\n", 1)[1][
        : expected.split("\n---\n", 1)[1].index("```text\n")
    ].count("\n")
    bodies = (each.split("\n---\n", 1)[1].partition("```text\n")[0] for each in (text, expected))
    cells = [len(re.findall(r"(?<!\\)\|", each)) for each in bodies]
    assert cells[0] == cells[1]
    assert body.count("```") == expected.count("```")
    outside = re.sub(r"`[^`\n]*`", "", body[:start])
    assert not re.search(r"<(script|img)|(?<!\\)\]\(|(?<!\\)!\[|://evil|www\.evil|@everyone", outside)
    assert all(char.isprintable() or char == "\n" for char in body)


# ---- secrets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:secret@bucket/x: no", "s3://***@bucket/x: no"),
        ("https://h/x?X-Amz-Signature=abc&y=1 failed", "https://h/x?*** failed"),
        ("'https://h/x?sig=abc'", "'https://h/x?***'"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("is it up? see docs", "is it up? see docs"),
        ("s3://AKIA:se/cr+et@bucket/x: no", "s3://***@bucket/x: no"),
        ("s3://AKIA:s@cr@et@bucket/x", "s3://***@bucket/x"),
        ("s3:///AKIA:secret@bucket", "s3:///***@bucket"),
        ("//u:secret@bucket/x", "//***@bucket/x"),
        ("s3://b/me@here.org/x: no", "s3://b/me@here.org/x: no"),
        ("hf://datasets/o/name@main/x: no", "hf://datasets/o/name@main/x: no"),
        ("hf://u:secret@datasets/o", "hf://***@datasets/o"),
        ("a/b//c@d", "a/b//c@d"),
        ("mail a@b.org", "mail a@b.org"),
    ],
)
def test_urls_lose_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "place", ["s3://u:hun ter2@b/x", "s3://u:a/ter2@b", "ftp://ter2@h", "s3:///u:ter2@b", "s3://b/x?k=ter2"]
)
@pytest.mark.parametrize("command", [("verify",), ("inspect",), ("pull", "-")])
def test_a_place_that_is_refused_shows_no_key(
    place: str, command: tuple[str, ...], tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    ended = pipeline(command[0], place, *(tmp_path / "x" for _ in command[1:]))
    assert ended.code == 2 and "ter2" not in ended.err + ended.out, ended.err


def test_a_secret_that_was_cut_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id_ed25519")
    assert without_secrets("refused: hf_0123456789abc") == "refused: ***"
    assert without_secrets("/home/me/.ssh/other hf_0123") == "/home/me/.ssh/other hf_0123"


@pytest.mark.parametrize("name", ["license", "citation"])
@pytest.mark.parametrize("text", ["see https://u:hunter2@h/x", "s3://h/x?X-Amz-Signature=hunter2", "hunter2hunter2"])
def test_a_card_is_given_no_key(
    name: str, text: str, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    (tmp_path / "t.jsonl").write_text('{"text": "A dog ran."}\n')
    given = ("--teacher", tiny.teacher, "--dataset", tmp_path / "t.jsonl", "--output", tmp_path / "c")
    ended = pipeline("cache-teacher", *given, f"--{name}", text, "--engine", "transformers")
    assert ended.code == 2 and f"--{name}: holds a key or password" in ended.err and "hunter2" not in ended.err
    assert not (tmp_path / "c").exists()
    assert not holds_secret("@misc{x, url={https://openreview.net/forum?id=ab#top}, author={a@b.org}}")


@pytest.mark.parametrize("field", ["run_name", "project", "logging_dir"])
def test_a_training_keeps_no_key(
    field: str, tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    ended = trained(tiny, cache_path, tmp_path / "o", pipeline, "--trainer", f"{field}=https://u:hunter2@h/x")
    assert ended.code == 2 and "hunter2" not in ended.err and not (tmp_path / "o").exists(), ended.err


@pytest.mark.parametrize("name", ["HF_TOKEN", "PIPELINE_SERVER_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"])
def test_values_of_secret_variables_reach_no_terminal(
    name: str, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "sk-0123456789abcdef")
    for flags in ([], ["--debug"]):
        ended = pipeline(*flags, "verify", tmp_path / "sk-0123456789abcdef")
        assert ended.code != 0 and "sk-0123456789abcdef" not in ended.err + ended.out and "***" in ended.err


# ---- what a run leaves ------------------------------------------------------------------------------------------


def trained(tiny: Tiny, cache: Path, output: Path, pipeline: Callable[..., Any], *more: object) -> Any:
    given = ("--student", tiny.student, "--shards", cache, "--output", output, "--trainer", "dataloader_num_workers=0")
    return pipeline("train-student", *given, *more)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_of_a_student_have_the_permissions_of_new_files(
    umask: int, tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    before = os.umask(umask)
    try:
        assert trained(tiny, cache_path, tmp_path / "o", pipeline, "--max-steps", 2, "--save-steps", 1).code == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert {path.name for path in modes} >= {"model.safetensors", "metrics.json", "optimizer.pt"}
    assert set(modes.values()) == {0o666 & ~umask}, modes


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
@pytest.mark.parametrize("content", ["pickle", "noise", "nothing"])
def test_a_checkpoint_that_was_tampered_with_runs_nothing(
    name: str, content: str, tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ("--max-steps", 4, "--save-steps", 1)
    assert trained(tiny, cache_path, tmp_path / "o", pipeline, *words).code == 0
    (tmp_path / "o" / "metrics.json").unlink()
    last = max((tmp_path / "o").glob("checkpoint-*"))
    spoilt = {"pickle": pickle.dumps(Evil()), "noise": os.urandom(2000), "nothing": b""}[content]
    (last / name).write_bytes(spoilt)
    ended = trained(tiny, cache_path, tmp_path / "o", pipeline, *words)
    assert not (tmp_path / "owned").exists()
    assert ended.code == 1, ended.err
    assert "internal" not in ended.err and "weights_only" not in ended.err and "Traceback" not in ended.err
    assert f"{last.name}: cannot be loaded" in ended.err


def test_a_configuration_that_grows_without_end_is_refused(tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    """Ten aliases of ten aliases of ten: a kilobyte that stands for gigabytes."""
    names = "abcdefghij"
    values = ["&a [x, x]", *(f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in itertools.pairwise(names))]
    path = tmp_path / "run.yaml"
    path.write_text(f"dataset: [{', '.join(values)}]\n")
    ended = pipeline("cache-teacher", "--config", path)
    assert ended.code == 2 and "the alias *a is not taken; write the value itself" in ended.err, ended.err
    # A value of a wrong kind is named, not shown.
    path.write_text("dataset: [[[x]], y]\n")
    assert "takes one value, found a sequence" in pipeline("cache-teacher", "--config", path).err


def test_a_name_of_any_length_is_cut(tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    manifest = make_manifest().model_dump(mode="json")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "k" * 100_000: 1}))
    ended = pipeline("verify", tmp_path)
    assert ended.code and len(ended.err) < 1000, len(ended.err)
    text = json.dumps(manifest).replace('"format_version": 1', f'"format_version": {"9" * 4000}')
    (tmp_path / "manifest.json").write_text(text)
    ended = pipeline("verify", tmp_path)
    assert "is newer than" in ended.err and len(ended.err) < 1000, len(ended.err)
    assert len(pipeline("verify", "x" * 3_000_000).err) < 7000
