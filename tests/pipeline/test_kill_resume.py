"""Killed at any moment and started again, a command ends where it would have ended undisturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.damage import contents
from storage.cache import Cache
from storage.contained import ContainedPath
from storage.errors import CacheError
from tests.conftest import Finished, Tiny
from tests.pipeline import apart
from tests.storage.synthetic import make_manifest, write_cache

PATIENCE = 120
MANIFEST = apart.made_up_manifest()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL takes nothing from the kernel's cache, so flushing it would only cost time (as in `apart`)."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def assert_same(folder: Path, undisturbed: Path) -> None:
    """The same files with the same bytes: rows, values, receipts, tail prior, tokenizer, card."""
    assert not list(folder.rglob(".tmp-*"))
    ours, theirs = contents(folder), contents(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def assert_nothing_half_done(folder: Path) -> int:
    """Every file under a final name is whole; returns how many shards are finished."""
    if not (folder / "manifest.json").exists():
        assert not (folder / "shards").exists()
        return 0
    cache = Cache.open(folder)
    finished = 0
    for index in range(len(cache.manifest.shards)):
        if cache.receipt_path(index).exists():
            cache.check_file(index)
            finished += 1
        elif cache.shard_path(index).exists():
            cache.read_shard(index)
    if cache.is_sealed:
        assert finished == len(cache.manifest.shards)
        assert cache.tail_prior() is not None
    return finished


# ---- the storage of a cache, at every single step ---------------------------------------------------------


def test_killed_before_every_step_of_writing_a_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "undisturbed", MANIFEST, sketch=apart.SKETCH)
    survived: list[int] = []
    for step in range(1, 500):
        path = tmp_path / f"killed-{step}"
        child = apart.start(apart.write_made_up_cache, str(path), step, errors=str(tmp_path / "stderr"))
        child.join(PATIENCE)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
        survived.append(assert_nothing_half_done(path))
        write_cache(path, MANIFEST, sketch=apart.SKETCH)
        assert_same(path, tmp_path / "undisturbed")
        shutil.rmtree(path)
    print(f"{len(survived)} steps, finished shards after each: {survived}")
    assert len(survived) > 50
    assert set(survived) == {0, 1, 2} and survived == sorted(survived)


def test_killed_again_and_again_in_the_same_directory(tmp_path: Path) -> None:
    """What each attempt finds is what the killed ones before it left."""
    write_cache(tmp_path / "undisturbed", MANIFEST, sketch=apart.SKETCH)
    path, kills, dice = tmp_path / "cache", 0, random.Random(0)
    while True:
        child = apart.start(apart.write_made_up_cache, str(path), dice.randint(1, 80), errors=str(tmp_path / "stderr"))
        child.join(PATIENCE)
        assert_nothing_half_done(path)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
        kills += 1
        assert kills < 100
    assert kills >= 3
    assert_same(path, tmp_path / "undisturbed")


def test_two_commands_cannot_claim_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds the directory empty, and the first writes its manifest just then."""
    ours, theirs = make_manifest(), make_manifest(seed=1)
    resume = Cache.resume

    def slow(path: Path, manifest: Any) -> Cache | None:
        found = resume(path, manifest)
        monkeypatch.setattr(Cache, "resume", resume)
        Cache.create_or_resume(tmp_path / "cache", theirs)
        return found

    monkeypatch.setattr(Cache, "resume", slow)
    with pytest.raises(CacheError, match=r"another cache .*seed: 1, not 0"):
        Cache.create_or_resume(tmp_path / "cache", ours)
    assert Cache.open(tmp_path / "cache").manifest == theirs
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_a_directory_claimed_between_two_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest appears after it was looked for, and before the files are listed."""
    listed = ContainedPath.iterdir

    def late(path: Path) -> Any:
        monkeypatch.setattr(ContainedPath, "iterdir", listed)
        write_cache(tmp_path / "cache", MANIFEST)
        return listed(path)

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(ContainedPath, "iterdir", late)
    Cache.check_target(tmp_path / "cache")
    assert Cache.resume(tmp_path / "cache", MANIFEST) is not None


# ---- cache-teacher ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undisturbed:
    """A cache made in one go; `loading` and `writing` are the seconds before and after its first receipt."""

    path: Path
    loading: float
    writing: float

    @property
    def shards(self) -> int:
        return len(Cache.open(self.path).manifest.shards)


def caching_words(tiny: Tiny, output: Path) -> list[str]:
    """One shard for every sequence, so that there is much to interrupt."""
    words = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", output]
    return [
        str(word) for word in [*words, "--engine", "transformers", "--top-n", 8, "--shard-tokens", 2, "--processes", 1]
    ]


def wait_for(condition: Callable[[], object], child: Any) -> bool:
    """Whether `condition` came true before the child ended."""
    started = time.monotonic()
    while not condition():
        if child.exitcode is not None:
            return bool(condition())
        assert time.monotonic() - started < PATIENCE, "it hangs"
        time.sleep(0.002)
    return True


def says(errors: Path, words: str) -> Callable[[], bool]:
    return lambda: errors.exists() and words in errors.read_text()


def receipts(folder: Path) -> int:
    return len(list((folder / "shards").glob("part-*.json")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    path, errors = root / "cache", root / "stderr"
    child = apart.start(apart.command, caching_words(tiny, path), errors=str(errors))
    wait_for(says(errors, "loading the teacher"), child)
    started = time.monotonic()
    wait_for(lambda: receipts(path), child)
    loaded = time.monotonic()
    child.join(PATIENCE)
    assert child.exitcode == 0, errors.read_text()
    return Undisturbed(path, loaded - started, time.monotonic() - loaded)


def kill(child: Any) -> bool:
    """SIGKILL, and whether it came in time."""
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE)
    return child.exitcode == -signal.SIGKILL


def test_cache_teacher_killed_at_random_moments(
    tmp_path: Path, tiny: Tiny, undisturbed: Undisturbed, pipeline: Callable[..., Finished]
) -> None:
    """Some kills come while the teacher is loaded, most at any point of the writing, as far as five shards on."""
    dice = random.Random(20)
    per_shard = undisturbed.writing / undisturbed.shards
    survived: list[int] = []  # finished shards after each kill

    def during() -> list[int]:
        return [count for count in survived if 0 < count < undisturbed.shards]

    def thirds() -> set[int]:
        return {3 * count // undisturbed.shards for count in during()}

    errors = tmp_path / "stderr"
    for cache in range(6):
        path = tmp_path / f"cache-{cache}"
        while True:
            errors.unlink(missing_ok=True)
            before = receipts(path)
            child = apart.start(apart.command, caching_words(tiny, path), errors=str(errors))
            if dice.random() < 0.2:
                wait_for(says(errors, dice.choice(["corpus: ", "loading the teacher"])), child)
                time.sleep(dice.uniform(0, undisturbed.loading))
            elif wait_for(lambda path=path, before=before: receipts(path) > before, child):
                time.sleep(dice.uniform(0, 5 * per_shard))
            if child.exitcode is not None or not kill(child):
                assert child.exitcode == 0, errors.read_text()
                break
            survived.append(assert_nothing_half_done(path))
            assert survived[-1] >= before
        assert_same(path, undisturbed.path)
        assert pipeline("verify", path).code == 0
        if len(survived) >= 20 and len(during()) >= 10 and thirds() == {0, 1, 2}:
            break
    print(f"{len(survived)} kills, finished shards after each: {survived}, of {undisturbed.shards}")
    assert len(survived) >= 20
    # They hit during the work, and all over it.
    assert len(during()) >= 10
    assert thirds() == {0, 1, 2}


@pytest.mark.parametrize(
    ("function", "times", "needle"),
    [
        ("os:replace", 1, "tokenizer"),
        ("storage.cache:sync_directory", 1, ""),
        ("storage.cache:write_bytes", 1, "README.md"),
        ("storage.files:os.replace", 1, "tail_prior"),
        ("transformers.tokenization_utils_base:PreTrainedTokenizerBase.save_pretrained", 1, ""),
    ],
    ids=["tokenizer copied", "tokenizer renamed", "before the card", "before the tail prior", "before the tokenizer"],
)
def test_cache_teacher_killed_between_its_parts(
    tmp_path: Path, tiny: Tiny, undisturbed: Undisturbed, function: str, times: int, needle: str
) -> None:
    path, errors = tmp_path / "cache", tmp_path / "stderr"
    words = caching_words(tiny, path)
    child = apart.start(apart.command_killed_in, words, function, times, needle, errors=str(errors))
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL, errors.read_text()
    assert_nothing_half_done(path)
    child = apart.start(apart.command, words, errors=str(errors))
    child.join(PATIENCE)
    assert child.exitcode == 0, errors.read_text()
    assert_same(path, undisturbed.path)


def test_the_same_command_makes_lost_and_damaged_shards_again(
    tmp_path: Path, tiny: Tiny, undisturbed: Undisturbed
) -> None:
    """A disk may lose what was written long ago; only that is done again."""
    path, errors = tmp_path / "cache", tmp_path / "stderr"
    shutil.copytree(undisturbed.path, path)
    cache = Cache.open(path)
    cache.shard_path(2).unlink()
    cache.receipt_path(3).unlink()
    cache.receipt_path(5).write_text("{")
    for damaged in (cache.shard_path(7), cache.tail_sum_path(11)):
        raw = bytearray(damaged.read_bytes())
        raw[100] ^= 1
        damaged.write_bytes(raw)
    (path / "tail_prior.parquet").unlink()
    child = apart.start(apart.command, caching_words(tiny, path), errors=str(errors))
    child.join(PATIENCE)
    assert child.exitcode == 0, errors.read_text()
    assert f"{undisturbed.shards - 5} of {undisturbed.shards} shards are done already" in errors.read_text()
    assert_same(path, undisturbed.path)


def test_two_processes_cache_into_one_directory(
    tmp_path: Path, tiny: Tiny, undisturbed: Undisturbed, pipeline: Callable[..., Finished]
) -> None:
    path = tmp_path / "cache"
    words = caching_words(tiny, path)
    errors = [tmp_path / "stderr-0", tmp_path / "stderr-1"]
    children = [apart.start(apart.command, words, errors=str(error)) for error in errors]
    for child, error in zip(children, errors, strict=True):
        child.join(PATIENCE)
        assert child.exitcode == 0, error.read_text()
    assert all("59 shards to score" in error.read_text() for error in errors)
    assert_same(path, undisturbed.path)
    assert pipeline("verify", path).code == 0


# ---- train-student ----------------------------------------------------------------------------------------


def training_words(tiny: Tiny, cache: Path, output: Path) -> list[str]:
    """12 steps of two micro-batches; an epoch has 7 micro-batches, so epochs end inside the accumulation."""
    words = ["train-student", "--student", tiny.student, "--shards", cache, "--output", output]
    words += ["--max-steps", 12, "--save-steps", 3, "--accumulate", 2, "--batch-size", 8, "--eval-share", 0.1]
    words += ["--learning-rate", 1e-3, "--rank-scope", "corpus", "--trainer", "logging_steps=1"]
    return [str(word) for word in words]


@dataclass(frozen=True)
class Trained:
    path: Path
    seconds: float


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, cache_path: Path) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    path, errors = root / "student", root / "stderr"
    child = apart.start(apart.command, training_words(tiny, cache_path, path), errors=str(errors))
    wait_for((path / "run.json").exists, child)
    started = time.monotonic()
    child.join(PATIENCE)
    assert child.exitcode == 0, errors.read_text()
    return Trained(path, time.monotonic() - started)


def measured(output: Path) -> dict[str, Any]:
    """`metrics.json` without what a clock says."""

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            timed = ("_runtime", "_per_second", "_seconds")
            return {name: untimed(item) for name, item in value.items() if not name.endswith(timed)}
        return [untimed(item) for item in value] if isinstance(value, list) else value

    return untimed(json.loads((output / "metrics.json").read_text()))


def assert_same_student(output: Path, trained: Trained) -> None:
    """Weights bit for bit, the loss of every step, every measure on the held-out share."""
    assert (output / "model.safetensors").read_bytes() == (trained.path / "model.safetensors").read_bytes()
    ours, theirs = measured(output), measured(trained.path)
    logs = [[(entry["step"], entry["loss"]) for entry in run.pop("log") if "loss" in entry] for run in (ours, theirs)]
    assert logs[0] == logs[1] and len(logs[0]) == 12
    # Trainer's mean over the steps starts anew with every resume; then it must not be given for the whole run's.
    assert ours.pop("train_loss") in (None, theirs.pop("train_loss"))
    assert ours == theirs
    assert not list(output.rglob(".tmp-*"))


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def test_train_student_killed_at_random_moments(tmp_path: Path, tiny: Tiny, cache_path: Path, trained: Trained) -> None:
    dice = random.Random(3)
    errors = tmp_path / "stderr"
    left: list[int] = []  # the last checkpoint after each kill
    for run in range(4):
        output = tmp_path / f"student-{run}"
        words = training_words(tiny, cache_path, output)
        for attempt in range(7):
            errors.unlink(missing_ok=True)
            before = max(checkpoints(output), default=0)
            child = apart.start(apart.command, words, errors=str(errors))
            if attempt < 6:
                if attempt % 2:
                    wait_for(lambda output=output, before=before: max(checkpoints(output), default=0) > before, child)
                    time.sleep(dice.uniform(0, 0.2 * trained.seconds))
                else:
                    wait_for((output / "run.json").exists, child)
                    time.sleep(dice.uniform(0, 0.7 * trained.seconds))
                if child.exitcode is None and kill(child):
                    left.append(max(checkpoints(output), default=0))
                    continue
            child.join(PATIENCE)
            assert child.exitcode == 0, errors.read_text()
            break
        assert_same_student(output, trained)
        if len([step for step in left if 0 < step < 12]) >= 2:
            break
    print(f"{len(left)} kills, last checkpoint after each: {left}")
    assert len([step for step in left if 0 < step < 12]) >= 2


@pytest.mark.parametrize(
    ("function", "times", "whole"),
    [
        ("transformers.modeling_utils:safe_save_file", 2, 3),
        ("transformers.trainer:Trainer._save_optimizer_and_scheduler", 2, 3),
        ("transformers.trainer:Trainer._save_rng_state", 2, 3),
        ("transformers.trainer:TrainerState.save_to_json", 2, 3),
        ("transformers.trainer:rotate_checkpoints", 3, 9),
        ("stages.training:DistillationTrainer.evaluation_loop", 2, 6),
    ],
    ids=["weights", "optimizer", "random state", "state", "old checkpoints removed", "evaluation"],
)
def test_train_student_killed_while_it_saves(
    tmp_path: Path, tiny: Tiny, cache_path: Path, trained: Trained, function: str, times: int, whole: int
) -> None:
    """A checkpoint that is not whole is passed over for the one before it, of step `whole`."""
    output, errors = tmp_path / "student", tmp_path / "stderr"
    words = training_words(tiny, cache_path, output)
    child = apart.start(apart.command_killed_in, words, function, times, errors=str(errors))
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL, errors.read_text()
    child = apart.start(apart.command, words, errors=str(errors))
    child.join(PATIENCE)
    assert child.exitcode == 0, errors.read_text()
    assert f"going on from {output / f'checkpoint-{whole}'}\n" in errors.read_text()
    assert_same_student(output, trained)


@pytest.mark.parametrize("name", ["trainer_state.json", "run.json", "metrics.json"])
def test_train_student_killed_inside_a_file(
    tmp_path: Path, tiny: Tiny, cache_path: Path, trained: Trained, name: str
) -> None:
    """The newest checkpoint's state is cut short; or a temporary of ours is all that a killed run left of a file."""
    output, errors = tmp_path / "student", tmp_path / "stderr"
    if name == "run.json":
        output.mkdir()
    else:
        shutil.copytree(trained.path, output)
        (output / "metrics.json").unlink()
    gone = apart.start(abs, 0, errors=str(errors))
    gone.join(PATIENCE)
    if name == "trainer_state.json":
        os.truncate(output / "checkpoint-12" / name, 100)
    else:
        from storage import files

        mine = files.temporary_for(output / name)
        mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{gone.pid}.")).write_bytes(b"{")
    child = apart.start(apart.command, training_words(tiny, cache_path, output), errors=str(errors))
    child.join(PATIENCE)
    assert child.exitcode == 0, errors.read_text()
    assert_same_student(output, trained)
