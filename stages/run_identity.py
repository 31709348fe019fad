"""The run that an output directory holds: `run.json`, its checkpoints, its metrics.

The same command again goes on from the last checkpoint, or says that all is done; another command is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.local_files import check_apart
from storage.cache import Cache
from storage.errors import UserError
from storage.json_text import parse_json
from storage.new_path import check_new_path, local_path

if TYPE_CHECKING:
    from stages.student import StudentOptions

RUN = "run.json"
METRICS = "metrics.json"


def run_identity(options: StudentOptions, caches: Sequence[Cache]) -> dict[str, Any]:
    """What must agree for a run to be the same run."""
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
        "trainer": options.trainer,
    }
    return json.loads(json.dumps(identity, default=str))


def previous_run(options: StudentOptions, caches: Sequence[Cache]) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint to go on from, or the metrics of a run that is already done."""
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
    there, ours = _read_object(output / RUN), run_identity(options, caches)
    if differing := [key for key in sorted({*there, *ours}) if there.get(key) != ours.get(key)]:
        raise UserError(
            f"{output}: holds another run, which differs in {', '.join(differing)}; "
            "name a new --output or repeat the command that began it"
        )
    if (output / METRICS).exists():
        return None, _read_object(output / METRICS)
    return last_whole_checkpoint(output), None


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
