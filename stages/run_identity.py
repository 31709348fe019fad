"""The run that an output directory holds: `run.json`, its checkpoints, its metrics.

The same command again resumes from the last checkpoint, or says that all is done; another command is refused, and so is
one that comes while another is at work there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.local_files import check_apart
from stages.trainer_arguments import MAY_CHANGE
from storage.cache import Cache
from storage.errors import UserError
from storage.json_text import parse_json
from storage.new_path import check_new_path, local_path

if TYPE_CHECKING:
    from stages.student import StudentOptions

RUN = "run.json"
METRICS = "metrics.json"
_LOCK = ".lock"
# Longer values are cut in sentences.
_SHOWN = 60


def run_identity(options: StudentOptions, caches: Sequence[Cache], devices: int) -> dict[str, Any]:
    """Return what must agree for a run to be the same run. devices: how many train together."""
    path = Path(options.student)
    name = str(path.resolve()) if path.exists() else options.student
    identity = {
        "student": name,
        "revision": options.revision,
        "init_from_config": options.init_from_config,
        "caches": [cache.manifest.cache_id for cache in caches],
        "shards": [list(cache.shards_here) if cache.is_partial else None for cache in caches],
        "mix": options.mix,
        "batching": options.batching,
        "batch_tokens": options.batch_tokens,
        "objective": asdict(options.objective),
        "eval_share": options.eval_share,
        "seed": options.seed,
        "dtype": options.dtype,
        "lora": [options.lora_rank, options.lora_alpha, options.lora_target] if options.lora_rank else None,
        # Batches are dealt out to the devices, so fewer of them would see other sequences.
        "devices": devices,
        "trainer": {name: value for name, value in options.trainer.items() if name not in MAY_CHANGE},
    }
    return json.loads(json.dumps(identity, default=str))


def previous_run(
    options: StudentOptions, caches: Sequence[Cache], devices: int
) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint to resume from, or the metrics of a run that is already done.

    Raises UserError where the output holds another run, with each difference named, or no run at all.
    """
    output = local_path(options.output, "a student")
    check_new_path(output)
    for cache in caches:
        check_apart(str(cache.path), options.output, "cache", may_hold=True)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output wants a directory")
    # Hidden files may be what a killed run left of its first one.
    if not output.is_dir() or all(entry.name[:1] == "." for entry in output.iterdir()):
        return None, None
    if not (output / RUN).exists():
        raise UserError(f"{output}: holds other files and no run of train-student; name a new --output")
    there, ours = _read_object(output / RUN), run_identity(options, caches, devices)
    if differing := _differences(there, ours):
        raise UserError(
            f"{output}: holds another run ({'; '.join(differing[:4])}); "
            "name a new --output or repeat the command that began it"
        )
    if (output / METRICS).exists():
        return None, _read_object(output / METRICS)
    return last_whole_checkpoint(output), None


def _differences(there: dict[str, Any], ours: dict[str, Any], under: str = "") -> list[str]:
    """Each difference with both values: `devices: 2 there, 1 here`."""
    found = []
    for key in sorted({*there, *ours}):
        one, other = there.get(key), ours.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{under}{key} ")
        elif one != other:
            found.append(f"{under}{key}: {_shown(one)} there, {_shown(other)} here")
    return found


def _shown(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@contextmanager
def sole_run(output: Path) -> Iterator[None]:
    """Hold the output for this process alone, until it ends. Raises UserError where another holds it.

    The system gives the lock back when a process dies. Where a file system has no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = output / _LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{output}: another command trains into it; wait for it, or name a new --output") from None
        except OSError:
            break
        # Its holder removes it, perhaps between the two lines above.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged; name a new --output")
    return value


def last_whole_checkpoint(output: Path) -> str | None:
    """Trainer writes a checkpoint file by file and its state last: without a state that parses, it is not whole."""
    steps = [int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*") if path.name[11:].isdigit()]
    for step in sorted(steps, reverse=True):
        checkpoint = output / f"checkpoint-{step}"
        try:
            parse_json((checkpoint / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None
