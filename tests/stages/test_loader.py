"""The loader under Trainer: workers, resuming inside an epoch, several devices, ranks over the whole step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stages.mixing import Mixture
from storage.cache import Cache
from tests import reference
from tests.conftest import Tiny
from tests.pipeline import apart
from tests.stages import recorded

PATIENCE = 60


def given(tiny: Tiny, cache: Path, output: Path, **more: Any) -> dict[str, Any]:
    """4 epochs of seven micro-batches, two a step, so that epochs end inside a step; a checkpoint every third."""
    trainer = {"num_train_epochs": 4, "gradient_accumulation_steps": 2, "save_steps": 3, "learning_rate": 1e-3}
    trainer |= {"logging_steps": 1, "eval_strategy": "no", **more.pop("trainer", {})}
    return {"student": str(tiny.student), "shards": [str(cache)], "output": str(output), "trainer": trainer, **more}


def steps(record: list[dict[str, Any]], start: int = 0) -> list[Any]:
    return [(entry["step"], entry["sequences"], entry["loss"]) for entry in record if entry["step"] >= start]


@pytest.mark.parametrize(
    "more",
    [
        {"trainer": {"dataloader_num_workers": 0}},
        {"trainer": {"dataloader_num_workers": 2}},
        {"batching": "length-grouped"},
        {"batching": "packed", "batch_tokens": 1000},
        {"mix": (0.25, 0.75)},
    ],
    ids=["no worker", "two workers", "length-grouped", "packed", "mixed"],
)
def test_resumed_inside_an_epoch_sees_exactly_the_next_batch(
    more: dict[str, Any], tiny: Tiny, cache_path: Path, other_cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped in the first and in a later epoch; every batch, its loss, and the weights at the end."""
    more = {name: dict(value) if isinstance(value, dict) else value for name, value in more.items()}

    def options(output: Path) -> dict[str, Any]:
        found = given(tiny, cache_path, output, **{k: dict(v) if isinstance(v, dict) else v for k, v in more.items()})
        if "mix" in more:
            found["shards"].append(str(other_cache))
        return found

    whole = recorded.run(options(tmp_path / "whole"))
    last = whole[-1]["step"]
    read: list[int] = []
    getitems = Mixture.__getitems__
    monkeypatch.setattr(Mixture, "__getitems__", lambda self, i: read.append(1) or getitems(self, i))
    for stop in (3, last - 4):
        resumed_from = stop - stop % 3
        output = tmp_path / f"stopped-{stop}"
        before = recorded.run(options(output), stop_after=stop)
        assert steps(before) == [step for step in steps(whole) if step[0] < stop]
        read.clear()
        after = recorded.run(options(output))
        assert steps(after) == steps(whole, resumed_from)
        if more.get("trainer", {}).get("dataloader_num_workers") == 0:
            assert len(read) == len(after)
    one, other = (np.load(folder / "weights.npz") for folder in (tmp_path / "whole", output))
    assert all(np.array_equal(one[name], other[name]) for name in one.files)


@pytest.fixture(scope="module")
def other_cache(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same teacher and other text: the second half of the corpus, more entries per position."""
    return make_cache(tmp_path_factory.mktemp("other") / "cache", top_n=12, limit=20).path


def together(devices: int, given: dict[str, Any], folder: Path, stop_after: int | None = None) -> list[list[Any]]:
    """The records of a run on several devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    children = []
    for rank in range(devices):
        paths = str(folder / f"record-{rank}"), str(folder / f"errors-{rank}")
        arguments = (rank, devices, port, given, paths[0], stop_after)
        children.append((apart.start(recorded.device, *arguments, errors=paths[1]), *paths))
    found = []
    for child, record, errors in children:
        child.join(PATIENCE)
        assert child.exitcode == 0, Path(errors).read_text()
        found.append(json.loads(Path(record).read_text()))
    return found


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_two_devices_share_every_epoch_and_resume(batching: str, tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    sizes = {"batching": batching, "batch_tokens": 700} if batching == "packed" else {}
    small = {"per_device_train_batch_size": 3} if batching == "padded" else {}

    def options(name: str, **more: Any) -> dict[str, Any]:
        more = {"num_train_epochs": 2, "save_steps": 2, **small, **more}
        return given(tiny, cache_path, tmp_path / name, trainer=more, **sizes)

    (one,) = together(1, options("one"), tmp_path / "records-one")
    two = together(2, options("two", gradient_accumulation_steps=1), tmp_path / "records-two")
    assert len(two[0]) == len(two[1])
    drawn = [[s for entry in device for s in entry["sequences"]] for device in two]
    epochs = len(two[0]) // 2
    sequences = len({s for entry in one for s in entry["sequences"]})
    for half in (slice(0, epochs), slice(epochs, None)):
        parts = [{s for entry in device[half] for s in entry["sequences"]} for device in two]
        assert not parts[0] & parts[1]
        assert len(parts[0] | parts[1]) == sequences
    assert sorted(drawn[0] + drawn[1]) == sorted(s for entry in one for s in entry["sequences"])
    if batching == "padded":
        # Two devices with one micro-batch each step as one device with two; only the last is cut to be shared.
        for step in range(epochs - 2):
            ours = sorted(entry["sequences"] for entry in one if entry["step"] == step)
            assert ours == sorted(entry["sequences"] for device in two for entry in device if entry["step"] == step)
    # Stopped in the second epoch: each device goes on with its own next batch.
    stop = two[0][epochs]["step"] + 3
    together(2, options("stopped", gradient_accumulation_steps=1), tmp_path / "records-stopped", stop)
    resumed = together(2, options("stopped", gradient_accumulation_steps=1), tmp_path / "records-resumed")
    start = resumed[0][0]["step"]
    assert two[0][epochs]["step"] < start <= stop
    for whole, after in zip(two, resumed, strict=True):
        assert [e["sequences"] for e in after] == [e["sequences"] for e in whole if e["step"] >= start]


@pytest.mark.parametrize("normalize", ["group", "token"])
def test_ranks_over_the_whole_step(normalize: str, tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """Against numpy's ranks of all tokens of a step; and the split over devices and micro-batches changes nothing."""
    objective = {"rank_scope": "global-batch", "normalize": normalize, "hard_ratio": 0.3}

    def options(name: str, batch: int, accumulate: int) -> dict[str, Any]:
        trainer = {"max_steps": 3, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        return given(tiny, cache_path, tmp_path / name, objective=dict(objective), trainer=trainer)

    (large,) = together(1, options("large", 12, 1), tmp_path / "records-large")
    (accumulated,) = together(1, options("accumulated", 3, 4), tmp_path / "records-accumulated")
    devices = together(2, options("devices", 3, 2), tmp_path / "records-devices")
    for records in ([large], [accumulated], devices):
        for step in range(3):
            parts = [entry for record in records for entry in record if entry["step"] == step]
            gold = np.concatenate([part["gold_logprob"] for part in parts])
            hard = np.concatenate([part["is_hard"] for part in parts])
            np.testing.assert_array_equal(hard, reference.is_hard(1 - np.exp(gold), 0.3))
    # Ranked over each micro-batch, these would differ.
    assert len({round(float(np.mean(entry["is_hard"])), 3) for entry in accumulated}) > 3
    one = np.load(tmp_path / "large" / "weights.npz")
    for name in ("accumulated", "devices"):
        other = np.load(tmp_path / name / "weights.npz")
        for parameter in one.files:
            np.testing.assert_allclose(other[parameter], one[parameter], atol=2e-4, err_msg=f"{name} {parameter}")


# ---- workers ----------------------------------------------------------------------------------------------


def test_what_a_worker_finds_wrong_is_one_sentence(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is lost after the checks at the start: the worker that misses it is another process."""
    shutil.copytree(cache_path, tmp_path / "cache")
    check_file = Cache.check_file
    shards = len(Cache.open(tmp_path / "cache").manifest.shards)
    checked: list[int] = []

    def lost(cache: Cache, index: int) -> Any:
        receipt = check_file(cache, index)
        # They are checked in several threads at once.
        checked.append(index)
        if len(checked) == shards:
            cache.shard_path(3).unlink()
        return receipt

    monkeypatch.setattr(Cache, "check_file", lost)
    base = ["train-student", "--student", tiny.student, "--shards", tmp_path / "cache", "--eval-share", 0]
    done = pipeline(*base, "--output", tmp_path / "out", "--max-steps", 50)
    assert done.code == 2
    sentences = [line for line in done.err.splitlines() if "error" in line.lower()]
    assert sentences == [f"error: {tmp_path / 'cache' / 'shards' / 'part-00003.parquet'}: shard 3 is missing"]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_workers_are_left_behind(how: signal.Signals, tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    output, errors = tmp_path / "out", tmp_path / "errors"
    words = ["train-student", "--student", tiny.student, "--shards", cache_path, "--output", output]
    words += ["--max-steps", 100_000, "--save-steps", 5, "--trainer", "dataloader_num_workers=2"]
    child = apart.start(apart.command, [str(word) for word in words], errors=str(errors))
    started = time.monotonic()
    while not list(output.glob("checkpoint-10")):  # the one before is whole then
        assert child.exitcode is None and time.monotonic() - started < PATIENCE, errors.read_text()
        time.sleep(0.02)
    workers = psutil.Process(child.pid).children(recursive=True)
    assert len(workers) >= 2
    # A terminal interrupts them all.
    for process in [psutil.Process(child.pid), *(workers if how == signal.SIGINT else [])]:
        os.kill(process.pid, how)
    child.join(PATIENCE)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    if how == signal.SIGKILL:
        return
    assert child.exitcode == 128 + how
    said = errors.read_text().splitlines()[-1]
    assert said.startswith("interrupted; checkpoint-" if how == signal.SIGINT else "stopped by SIGTERM; checkpoint-")
    assert said.endswith(" is kept; start the same command again to go on from it")
    assert "Traceback" not in errors.read_text()


def test_workers_that_are_spawned(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """As on macOS and Windows: everything a worker needs is pickled."""
    found = [
        recorded.run(given(tiny, cache_path, tmp_path / name, trainer={"max_steps": 4, **more}))
        for name, more in (
            ("none", {"dataloader_num_workers": 0}),
            ("spawned", {"dataloader_multiprocessing_context": "spawn"}),
        )
    ]
    assert steps(found[0]) == steps(found[1])
