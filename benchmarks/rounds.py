"""Several ways of doing a thing, each in a process of its own, in turns."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

_MARK = "RESULT "


def take_turns(
    module: str, flag: str, ways: Sequence[str], names: Sequence[str], arguments: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """What each of `ways` reported, round after round, so that a machine whose speed drifts does not favour one.

    Runs `python -m MODULE FLAG WAY` with the options `names` as they are in `arguments`, `arguments.rounds` times.
    """
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    given = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    for turn in range(arguments.rounds):
        for way in ways:
            command = [sys.executable, "-m", module, flag, way, *given]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
            if not lines:
                print(done.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{way} did not finish")
            found[way].append(json.loads(lines[0].removeprefix(_MARK)))
            print(f"round {turn + 1} {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    return found


def report(**numbers: float) -> None:
    """Called in the process of one way: what it measured."""
    print(_MARK + json.dumps(numbers), flush=True)
