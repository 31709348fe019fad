"""What a search over odd words of the command line found: each is one sentence and never an internal error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.words import part_of
from tests.conftest import Finished, Tiny
from tests.pipeline.test_bad_input import one_sentence

Pipeline = Callable[..., Finished]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a dangling link, a link to itself, a file, a small corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "rows.jsonl").write_text('{"text": "x = 1"}\n')
    return tmp_path


@pytest.fixture
def writing(tiny: Tiny, cache_path: Path, scene: Path) -> dict[str, list[object]]:
    """Every command that has an output, complete but for that."""
    return {
        "cache-teacher": ["cache-teacher", "--teacher", tiny.teacher, "--dataset", "rows.jsonl", "-o"],
        "plan": ["plan", "--teacher", tiny.teacher, "--dataset", "rows.jsonl", "-o"],
        "generate": ["generate", "--model", tiny.teacher, "--prompts", "rows.jsonl", "-o"],
        "train-student": ["train-student", "--student", tiny.student, "--shards", cache_path, "-o"],
        "select": ["select", cache_path, "-o"],
        "merge": ["merge", cache_path, cache_path, "-o"],
        "push": ["push", cache_path],
        "pull": ["pull", cache_path],
        "unbundle": ["unbundle", "file"],
        "bundle": ["bundle", cache_path],
    }


COMMANDS = ["cache-teacher", "plan", "generate", "train-student", "select", "push", "pull", "unbundle", "bundle"]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("dangling", "dangling: is a link that leads to nothing (nowhere)"),
        ("dangling/below", "dangling: is a link that leads to nothing (nowhere)"),
        ("loop", "loop: is a link that leads to nothing (loop)"),
        ("loop/below", "loop"),
        ("file/below", "file: is a file"),
        ("\udcff", "the name is not UTF-8"),
        ("x" * 300, "file name too long"),
        ("a\0b", "null character"),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_outputs_that_cannot_be_made(
    name: str, output: str, told: str, writing: dict[str, list[object]], scene: Path, pipeline: Pipeline
) -> None:
    before = sorted(os.listdir(scene))
    output += ".tar.zst" if name == "bundle" and "/" in output else ""
    if name == "bundle" and "/" not in output and "\0" not in output:
        (scene / "dangling.tar.zst").symlink_to("nowhere")
        before, output, told = sorted(os.listdir(scene)), "dangling.tar.zst", "leads to nothing"
    one_sentence(pipeline(*writing[name], output), 2, told)
    assert sorted(os.listdir(scene)) == before
    assert (scene / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["generate", "train-student", "unbundle", "bundle"])
def test_a_url_where_only_this_machine_is_written_to(
    name: str, writing: dict[str, list[object]], scene: Path, pipeline: Pipeline
) -> None:
    one_sentence(pipeline(*writing[name], "s3://bucket/x.tar.zst"), 2, "written to this machine; name a local path")
    assert not list(scene.glob("s3*"))


def test_names_that_no_file_can_have(scene: Path, pipeline: Pipeline, tiny: Tiny) -> None:
    for command in (["inspect"], ["verify"], ["audit", "--teacher", tiny.teacher], ["unbundle", "file"]):
        one_sentence(pipeline(*command, "y" * 5000), 2, "file name too long")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tail-epsilon", "nan"], "nan is not a finite number"),
        (["--temperature", "1e400"], "is not a finite number"),
        (["--temperature", "1"], "not 1, which is always there"),
        (["--temperature", "2", "--temperature", "2"], "temperatures must differ"),
        (["--tail-samples", str(2**31)], "--tail-samples"),
        (["--seed", str(10**23)], "--seed"),
        (["--citation", "\udcff"], "'--citation': holds bytes that are no UTF-8"),
        (["--license", "\udcff"], "'--license': holds bytes that are no UTF-8"),
        (["--engine", "server", "--server-url", "[x"], "--server-url [x: expected http://host:port"),
        (["--engine", "server", "--server-url", "."], "--server-url .: expected http://host:port"),
    ],
)
def test_numbers_and_names_that_no_cache_can_keep(
    more: list[str], told: str, writing: dict[str, list[object]], scene: Path, pipeline: Pipeline
) -> None:
    one_sentence(pipeline(*writing["cache-teacher"], "out", "--engine", "transformers", *more), 2, told)
    assert not (scene / "out").exists()


@pytest.mark.parametrize(
    "more", [["--mix", "nan"], ["--mix", "1e400"], ["--learning-rate", "-1"], ["--lora-rank", str(2**31)]], ids=str
)
def test_numbers_that_no_training_can_use(
    more: list[str], writing: dict[str, list[object]], scene: Path, pipeline: Pipeline
) -> None:
    one_sentence(pipeline(*writing["train-student"], "out", "--max-steps", "1", *more), 2, more[0], more[1])
    assert not (scene / "out").exists()


def test_a_name_that_begins_with_a_tilde_is_one_place(
    writing: dict[str, list[object]], scene: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer alone would expand it, as where a configuration file names it, and write in two places."""
    monkeypatch.setenv("HOME", str(scene / "home"))
    ended = pipeline(*writing["train-student"], "~/run", "--max-steps", 1, "--eval-share", 0)
    assert ended.code == 0, ended.err
    assert (scene / "~" / "run" / "model.safetensors").exists()
    assert not (scene / "home").exists()


def test_a_logger_that_does_not_exist(writing: dict[str, list[object]], scene: Path, pipeline: Pipeline) -> None:
    one_sentence(pipeline(*writing["train-student"], "out", "--report-to", "nobody"), 2, "nobody is not supported")
    assert not (scene / "out").exists()


def test_json_that_is_nested_beyond_all_depth(
    writing: dict[str, list[object]], scene: Path, pipeline: Pipeline
) -> None:
    (scene / "out").mkdir()
    (scene / "out" / "manifest.json").write_text("[" * 100_000)
    one_sentence(pipeline(*writing["cache-teacher"], "out", "--engine", "transformers"), 2, "manifest.json", "not JSON")


def test_a_configuration_without_an_end_or_with_a_null(scene: Path, pipeline: Pipeline) -> None:
    (scene / "long.yaml").write_text("#" * (2 << 20))
    one_sentence(pipeline("cache-teacher", "--config", "long.yaml"), 2, "long.yaml is longer than")
    (scene / "null.yaml").write_text('output: "a\\0b"\n')
    one_sentence(pipeline("cache-teacher", "--config", "null.yaml"), 2, "null.yaml, line 1", "null character")


@pytest.mark.parametrize("name", COMMANDS)
def test_empty_words_and_urls_that_lost_a_slash(
    name: str, writing: dict[str, list[object]], scene: Path, pipeline: Pipeline
) -> None:
    before = sorted(os.listdir(scene))
    word = {"push": "URL", "pull": "DIR", "unbundle": "DIR", "bundle": "FILE.tar.zst"}.get(name, "--output")
    one_sentence(pipeline(*writing[name], ""), 2, f"error: {word} is empty")
    for scheme in ("s3", "file"):
        given = f"{scheme}:/bucket/x.tar.zst"
        one_sentence(pipeline(*writing[name], given), 2, f"{given}: is no URL, which has two slashes ({scheme}://")
    assert sorted(os.listdir(scene)) == before


def test_what_is_read_may_be_no_empty_word_either(scene: Path, pipeline: Pipeline, tiny: Tiny) -> None:
    made = ["--dataset", "rows.jsonl", "-o", "out"]
    one_sentence(pipeline("cache-teacher", "--teacher", "", *made), 2, "--teacher is empty")
    one_sentence(pipeline("merge", "a", "", "-o", "out"), 2, "DIR_OR_URL... is empty")
    (scene / "c.yaml").write_text('revision: ""\n')
    one_sentence(
        pipeline("cache-teacher", "--config", "c.yaml", "--teacher", tiny.teacher, *made), 2, "--revision is empty"
    )
    for command in ("inspect", "verify"):
        one_sentence(pipeline(command, "s3:/bucket/x"), 2, "(s3://bucket/x)")


def test_nothing_is_written_inside_what_is_read(
    writing: dict[str, list[object]], cache_path: Path, scene: Path, pipeline: Pipeline, tiny: Tiny
) -> None:
    before = sorted(cache_path.rglob("*"))
    for name, inside in (
        ("select", "shards/x"),
        ("train-student", "x"),
        ("bundle", "x.tar.zst"),
        ("push", "x"),
        ("pull", "x"),
    ):
        for output in (f"{cache_path}/{inside}", f"file://{cache_path}/{inside}"):
            if name in ("train-student", "bundle") and "://" in output:
                continue
            one_sentence(pipeline(*writing[name], output), 2, f"The output {output} lies inside the cache {cache_path}")
    assert sorted(cache_path.rglob("*")) == before
    (scene / "prompts").mkdir()
    (scene / "prompts" / "a.jsonl").write_text('{"prompt": "x"}\n')
    ended = pipeline("generate", "--model", tiny.teacher, "--prompts", "prompts", "-o", "prompts/out.jsonl")
    one_sentence(ended, 2, "prompts/out.jsonl lies inside the data set prompts")


def test_what_is_no_cache_is_said_without_options_that_are_not_there(scene: Path, pipeline: Pipeline) -> None:
    for command in (["inspect"], ["verify"], ["select", "-o", "out"]):
        ended = pipeline(*command, "nowhere")
        one_sentence(ended, 2, "nowhere: no such directory; a cache is the directory that `pipeline cache-teacher`")
        one_sentence(pipeline(*command, "file"), 2, "file: is a file, not a directory; a cache is the directory")
        assert "--shards" not in ended.err


def test_inspect_says_why_the_engine_was_chosen(cache_path: Path, pipeline: Pipeline) -> None:
    said = pipeline("inspect", cache_path).out
    made_with = next(line for line in said.splitlines() if "made with" in line)
    assert "engine" not in made_with
    assert any("why this engine" in line and "named by --engine" in line for line in said.splitlines()), said


def test_a_share_of_one_is_one() -> None:
    assert [part_of(0, 1, "shard"), part_of(1, 3, "shard"), part_of(2, 3, "shard")] == [
        "0 of 1 shard is",
        "1 of 3 shards is",
        "2 of 3 shards are",
    ]
