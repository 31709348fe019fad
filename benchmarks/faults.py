"""What goes wrong with disks and processes, done on purpose and counted: `python -m benchmarks.faults`.

    kills         SIGKILL at random moments of `cache-teacher`, each time in what the earlier kills left
    calibrations  SIGKILL at random moments of making the sketch, before there is a cache that names it
    seals         SIGKILL at random moments of sealing: between the last receipt and the end of the command
    writers       two `cache-teacher` on one directory at once; of every other pair one is killed
    rivals        two different caches for one directory at once
    full          a disk that is full at every 4 KiB of what the cache takes, then has room again
    read-only     a disk that may not be written from the start, or from a random moment on
    flips         one byte changed, at every place of every file of a small cache
    cuts          files cut short
    misplaced     files swapped, doubled, renamed, missing, or of another cache of the same teacher
    edits         each field of the manifest, the receipts and the sketch's header: another value, another type, gone

The command is the real one; only its teacher, a random model, is loaded once and reaches the commands by fork. The
cache has all there can be: a sketch and what it misses, tail samples, as many entries as a position needs. After
every fault all files that are there must be, byte for byte, those of an undisturbed run, a shard that had its receipt
must have it still, and the same command again must end in the undisturbed cache. Damage is read as `train-student`
reads (`benchmarks.damage`). SIGKILL takes nothing from the kernel's cache: what a power cut does is not tried here.

Exit code 1 where anything was lost, wrong, or not said in one sentence.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import damage

PARTS = (
    "kills",
    "calibrations",
    "seals",
    "writers",
    "rivals",
    "full",
    "read-only",
    "flips",
    "cuts",
    "misplaced",
    "edits",
)
PATIENCE = 120
BLOCK = 4096
# What is kept: N (at most), samples, the mass that may stay in the tail, codes and residual samples of a sketch.
TOP_N, TAIL_SAMPLES, TAIL_EPSILON, SKETCH_RANK, RESIDUAL_SAMPLES = 6, 3, 0.2, 4, 2
SKETCH = "sketch.safetensors"


@dataclass
class Line:
    """A row of the table. notes: what the run found besides; failures: what must not have happened."""

    fault: str
    tried: int = 0
    notes: str = ""
    failures: list[str] = field(default_factory=list)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """The command's, from `words` or the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--calibrations", type=int, default=100)
    parser.add_argument("--seals", type=int, default=200)
    parser.add_argument("--writers", type=int, default=20, help="pairs of commands")
    parser.add_argument("--full", type=int, default=1, help="try every such block of 4 KiB")
    parser.add_argument("--read-only", type=int, default=20, help="moments")
    parser.add_argument("--flips", type=int, default=1, help="try every such byte; of the tokenizer every 16th of them")
    parser.add_argument(
        "--cuts", type=int, default=16, help="try every such length of files above 4 KiB, of others and the sketch all"
    )
    parser.add_argument("--others", type=int, default=1, help="try every such misplacing and edit")
    parser.add_argument("--documents", type=int, default=8, help="of the corpus")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that try damages")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main() -> int:
    arguments = options()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lines = run(Path(folder), arguments)
    print(table(lines))
    for line in lines:
        for failure in line.failures[:20]:
            print(f"{line.fault}: {failure}", file=sys.stderr)
    return 1 if any(line.failures for line in lines) else 0


def run(folder: Path, arguments: argparse.Namespace) -> list[Line]:
    """Every part that was asked for, in the order of the table."""
    site = Site.make(folder, arguments)
    lines: list[Line] = []
    for name in PARTS:
        if name in arguments.parts:
            started = time.monotonic()
            dice = random.Random(f"{arguments.seed} {name}")
            found = _PARTS[name](site, arguments, dice)
            lines += found
            # At once: of a run that is stopped, what was counted is left.
            print(f"{name}: {time.monotonic() - started:.0f} s\n{table(found)}", file=sys.stderr, flush=True)
    return lines


def table(lines: list[Line]) -> str:
    rows = [f"| {line.fault} | {line.tried:,} | {line.notes} | {len(line.failures)} |" for line in lines]
    return "\n".join(["| fault | tried | what became of it | failures |", "| --- | ---: | --- | ---: |", *rows])


# ---- the real command, with a teacher that is there already -----------------------------------------------


@dataclass
class Site:
    """A teacher, a corpus, and the caches that an undisturbed command makes of them.

    small: of two shards, other: of the same teacher and plan, but other text.
    """

    folder: Path
    teacher: Any
    whole: Path
    small: Path
    other: Path
    seconds: float  # from the claim of the directory to the end
    sealing: float
    calibrating: float

    @classmethod
    def make(cls, folder: Path, arguments: argparse.Namespace) -> Site:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch

        from benchmarks.models import random_qwen3
        from examples.demo.teacher import train_tokenizer
        from stages.statistics import StatisticsOptions
        from stages.teacher_transformers import TransformersTeacher

        # What is forked may not have threads that wait.
        torch.set_num_threads(1)
        library = Path(os.__file__).parent
        texts = [path.read_text(errors="ignore")[:400] for path in sorted(library.glob("[a-z]*.py"))]
        tokenizer = train_tokenizer(texts, folder / "teacher", 300)
        torch.manual_seed(0)
        model = random_qwen3(len(tokenizer), 16, 1, tied=False, head_dim=8)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20.0)
        model.save_pretrained(folder / "teacher")
        rows = [{"text": text[: 60 + 7 * index]} for index, text in enumerate(texts[: arguments.documents])]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kept = StatisticsOptions(
            TOP_N,
            tail_samples=TAIL_SAMPLES,
            tail_epsilon=TAIL_EPSILON,
            sketch_rank=SKETCH_RANK,
            residual_samples=RESIDUAL_SAMPLES,
        )
        teacher = TransformersTeacher(str(folder / "teacher"), kept)
        site = cls(folder, teacher, folder / "whole", folder / "small", folder / "other", 0.0, 0.0, 0.0)
        _import_all()
        site.made(site.whole)  # the first one is slower
        shutil.rmtree(site.whole)
        site.seconds = site.made(site.whole)
        site.calibrating = min(site.claimed(folder / f"calibrated-{turn}") for turn in range(3))
        sealed = [_without_seal(site, folder / f"sealing-{turn}") for turn in range(3)]
        site.sealing = min(site.start(path, moment="sealing").wait().seconds for path in sealed)
        site.made(site.small, "--limit", 2)
        other = folder / "other.jsonl"
        other.write_text((folder / "corpus.jsonl").read_text().replace(rows[0]["text"][5], "#"))
        site.made(site.other, "--dataset", other)
        return site

    def claimed(self, output: Path) -> float:
        """Seconds from the beginning of the calibration until there is a manifest, undisturbed."""
        running = self.start(output, moment="calibrating")
        running.reached()
        while not (output / "manifest.json").exists() and running.child.exitcode is None:
            time.sleep(0.001)
        seconds = time.monotonic() - running.since
        running.wait()
        return seconds

    def made(self, output: Path, *more: object) -> float:
        """The undisturbed command; returns its seconds."""
        ended = self.start(output, *more).wait()
        assert ended.code == 0, ended.errors
        return ended.seconds

    @property
    def shards(self) -> int:
        return len(json.loads((self.whole / "manifest.json").read_text())["shards"])

    def words(self, output: Path) -> list[str]:
        given = ["--teacher", self.folder / "teacher", "--dataset", self.folder / "corpus.jsonl", "--output", output]
        kept = ["--engine", "transformers", "--top-n", TOP_N, "--tail-samples", TAIL_SAMPLES, "--dtype", "float32"]
        kept += ["--tail-epsilon", TAIL_EPSILON, "--sketch-rank", SKETCH_RANK, "--residual-samples", RESIDUAL_SAMPLES]
        return [str(word) for word in ["cache-teacher", *given, *kept, "--shard-tokens", 90, "--processes", 1]]

    def start(self, output: Path, *more: object, moment: str = "claiming", file_bytes: int = 0) -> Running:
        """The command in a process of its own. moment: what `Running.reached` waits for, `calibrating`,
        `claiming` or `sealing`.

        file_bytes: beyond which no file of that process may grow.
        """
        errors = self.folder / f"stderr-{os.urandom(4).hex()}"
        read, write = os.pipe()
        words = [*self.words(output), *map(str, more)]
        child = multiprocessing.get_context("fork").Process(
            target=_command, args=(words, self.teacher, moment, write, errors, file_bytes)
        )
        child.start()
        os.close(write)
        return Running(child, read, errors)


def _import_all() -> None:
    """What the command imports on its way, so that a fork has it."""
    for module in ("datasets", "pipeline.cli", "pipeline.commands.cache_teacher", "pipeline.reports", "stages.student"):
        importlib.import_module(module)
    for module in ("stages.caching", "stages.shard_dataset", "transformers.models.auto.tokenization_auto"):
        importlib.import_module(module)


def _command(words: list[str], teacher: Any, moment: str, signal_to: int, errors: Path, file_bytes: int) -> None:
    """In the child: `pipeline cache-teacher`, with the teacher that came with the fork."""
    from stages import caching
    from storage.cache import Cache

    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))

    def telling(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            os.write(signal_to, b"!")
            return real(*given, **named)

        return call

    caching.load_teacher = lambda prepared: teacher  # type: ignore[assignment]
    if moment == "claiming":
        caching.run = telling(caching.run)
    elif moment == "calibrating":
        caching.calibrate = telling(caching.calibrate)
    else:
        Cache.seal = telling(Cache.seal)  # type: ignore[method-assign]
    from pipeline.cli import run as run_command

    code = 99
    try:
        code = run_command(words)
    finally:
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Ended:
    code: int
    errors: str
    seconds: float  # since the moment that was waited for

    @property
    def sentence(self) -> str:
        """The one error it ended with; empty where there was none, or more than a sentence."""
        found = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        said = len(found) == 1 and "Traceback" not in self.errors and "internal" not in found[0]
        return found[0] if said else ""


@dataclass
class Running:
    child: Any
    pipe: int
    errors: Path
    since: float = 0.0

    def reached(self) -> bool:
        """Wait for the moment; False where the command ended without it."""
        came = os.read(self.pipe, 1) == b"!"
        self.since = time.monotonic()
        return came

    def kill(self) -> None:
        os.kill(self.child.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        if not self.since:
            self.reached()
        self.child.join(PATIENCE)
        if self.child.exitcode is None:
            self.kill()
            raise RuntimeError(f"the command hangs: {self.errors.read_text()}")
        ended = Ended(self.child.exitcode, self.errors.read_text(), time.monotonic() - self.since)
        os.close(self.pipe)
        self.errors.unlink()
        self.since = 0.0
        return ended


def _without_seal(site: Site, target: Path) -> Path:
    """A cache with every receipt, which only has to be sealed."""
    shutil.copytree(site.whole, target)
    for path in target.iterdir():
        if path.is_file() and path.name not in ("manifest.json", SKETCH):
            path.unlink()
    return target


def _receipts(folder: Path) -> set[str]:
    return {path.name for path in (folder / "shards").glob("part-*.json")}


def _amiss(site: Site, folder: Path, before: set[str]) -> list[str]:
    """What is lost or wrong in a disturbed cache. before: the receipts that it had."""
    whole, found = damage.contents(site.whole), damage.contents(folder)
    problems = [f"lost {name}" for name in before - _receipts(folder)]
    problems += [f"{name} is not what an undisturbed run writes" for name in found if found[name] != whole.get(name)]
    for name in found:
        needed = name.replace(".json", ".parquet")
        if name.startswith("shards/") and needed not in found:
            problems.append(f"{name} without its shard")
    if "README.md" in found and found.keys() != whole.keys():
        problems.append("sealed, but not whole")
    return problems


def _finished(site: Site, folder: Path) -> list[str]:
    """The same command again, and what is then not as in the undisturbed run."""
    ended = site.start(folder).wait()
    if ended.code:
        return [f"the same command again: {ended.errors[-300:]}"]
    same = damage.contents(folder) == damage.contents(site.whole)
    left = [path.name for path in folder.rglob(".tmp-*")]
    return [] if same and not left else [f"the same command again ends in another cache {left}"]


def _killed(running: Running, seconds: float, dice: random.Random) -> bool:
    """Whether SIGKILL at a random moment of the next `seconds` came before the command's own end."""
    running.reached()
    time.sleep(dice.uniform(0, seconds))
    running.kill()
    return running.wait().code == -signal.SIGKILL


# ---- processes --------------------------------------------------------------------------------------------


def kills(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    line = Line("SIGKILL while caching")
    found: list[int] = []
    caches = 0
    while line.tried < arguments.kills:
        folder, caches = site.folder / f"killed-{caches}", caches + 1
        while line.tried < arguments.kills:
            before = _receipts(folder)
            if not _killed(site.start(folder), site.seconds, dice):
                break
            line.tried += 1
            found.append(len(_receipts(folder)))
            line.failures += _amiss(site, folder, before)
        line.failures += _finished(site, folder)
        shutil.rmtree(folder)
    during = sum(0 < count < site.shards for count in found)
    line.notes = f"{caches} caches of {site.shards} shards; {during} kills left some shards and not all"
    return [line]


def calibrations(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    line = Line("SIGKILL while calibrating the sketch")
    late = sketches = caches = 0
    while line.tried < arguments.calibrations:
        folder = site.folder / "uncalibrated"
        if _killed(site.start(folder, moment="calibrating"), 1.2 * site.calibrating, dice):
            line.tried += 1
            caches += (folder / "manifest.json").exists()
            sketches += (folder / SKETCH).exists() and not (folder / "manifest.json").exists()
            if folder.exists():
                line.failures += _amiss(site, folder, set())
            line.failures += _finished(site, folder)
        else:
            late += 1
        shutil.rmtree(folder)
    line.notes = (
        f"{sketches} kills left a sketch without a cache, {caches} a cache that names it; {late} more came too late"
    )
    return [line]


def seals(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    line = Line("SIGKILL while sealing")
    states: set[frozenset[str]] = set()
    late = 0
    while line.tried < arguments.seals:
        folder = _without_seal(site, site.folder / "unsealed")
        before = _receipts(folder)
        if _killed(site.start(folder, moment="sealing"), 1.1 * site.sealing, dice):
            line.tried += 1
            states.add(frozenset(damage.files_of(folder)))
            line.failures += _amiss(site, folder, before)
            line.failures += _finished(site, folder)
        else:
            late += 1
        shutil.rmtree(folder)
    line.notes = f"{len(states)} different sets of files were left; {late} more came too late"
    return [line]


def writers(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    line = Line("two writers at once")
    killed = 0
    for pair in range(arguments.writers):
        folder = site.folder / "shared"
        both = [site.start(folder), site.start(folder)]
        if pair % 2:
            both[0].reached()
            time.sleep(dice.uniform(0, site.seconds))
            both[0].kill()
        codes = [running.wait() for running in both]
        killed += codes[0].code == -signal.SIGKILL
        line.tried += 1
        if codes[1].code or codes[0].code not in (0, -signal.SIGKILL):
            line.failures += [ended.errors[-300:] for ended in codes if ended.code]
        line.failures += _amiss(site, folder, set())
        # What a killed writer left is cleared by the next command.
        line.failures += _finished(site, folder)
        shutil.rmtree(folder)
    line.notes = f"every pair ended in the undisturbed cache; of {killed} pairs one was killed"
    return [line]


def rivals(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    line = Line("two different caches for one directory")
    for pair in range(arguments.writers):
        folder = site.folder / "claimed"
        started = [site.start(folder), site.start(folder, "--limit", 3)]
        ends = [running.wait() for running in started]
        line.tried += 1
        won = [index for index, ended in enumerate(ends) if ended.code == 0]
        # The directory is whose sketch came first, or where both have the same one, whose manifest did.
        told = ("another cache", "another command left this sketch")
        if len(won) != 1 or ends[1 - won[0]].code != 2 or not any(words in ends[1 - won[0]].sentence for words in told):
            line.failures.append(f"pair {pair}: {[(ended.code, ended.errors[-200:]) for ended in ends]}")
        elif won[0] == 0:
            line.failures += _amiss(site, folder, set())
        elif found := damage.verified(folder):
            line.failures += found
        shutil.rmtree(folder)
    line.notes = "one is made, the other is refused"
    return [line]


# ---- disks ------------------------------------------------------------------------------------------------


@contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[str], bool] | None]:
    """A tmpfs at `folder`, and what changes its options; None where this user may not mount one."""
    folder.mkdir()

    def mount(options: str) -> bool:
        return _quietly("mount", "-o", f"remount,{options}", str(folder))

    if sys.platform != "linux" or not _quietly("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)):
        yield None
        return
    try:
        yield mount
    finally:
        _quietly("umount", str(folder))


def _quietly(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def full(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    sizes = [-(-path.stat().st_size // BLOCK) for path in site.whole.rglob("*") if path.is_file()]
    with _small_disk(site.folder / "tight") as mount:
        line = Line("full disk" if mount else "files may not grow (RLIMIT_FSIZE; no file system could be mounted)")
        refused = 0
        # Without a disk of its own it is the largest file that does not fit.
        steps = sum(sizes) + 4 if mount else max(sizes)
        for blocks in range(1, steps, arguments.full):
            folder = site.folder / "tight" / "cache"
            if mount:
                mount(f"size={blocks * BLOCK}")
                ended = site.start(folder).wait()
            else:
                ended = site.start(folder, file_bytes=blocks * BLOCK // 2).wait()
            line.tried += 1
            refused += ended.code != 0
            if ended.code not in (0, 1) or (ended.code and not ended.sentence):
                line.failures.append(f"{blocks} blocks: {ended.errors[-300:]}")
            if folder.exists():
                line.failures += _amiss(site, folder, set())
            if mount:
                mount("size=64m")
            line.failures += _finished(site, folder)
            shutil.rmtree(folder)
    where = f"a tmpfs of {BLOCK >> 10} KiB more each time" if mount else "half a block more each time"
    line.notes = f"{where}; {refused} runs ended with one sentence, and with room went on to the undisturbed cache"
    return [line]


def read_only(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    line = Line("read-only disk")
    with _small_disk(site.folder / "locked") as mount:
        if mount is None:
            line.notes = "not tried: no file system could be mounted"
            return [line]
        mount("size=64m")
        folder = site.folder / "locked" / "cache"
        undamaged = damage.read(site.whole)
        refused = 0
        for moment in range(arguments.read_only + 2):
            if moment == 0:  # nothing there yet
                mount("ro")
            if moment == 1:  # all there: it can be checked and trained from
                shutil.copytree(site.whole, folder)
                mount("ro")
                if damage.read(folder) != undamaged or damage.verified(folder):
                    line.failures.append("a finished cache on a read-only disk is not read")
            running = site.start(folder)
            if moment > 1 and running.reached():
                time.sleep(dice.uniform(0, site.seconds))
                # Refused as long as a file is open for writing.
                while not mount("ro") and running.child.exitcode is None:
                    pass
            ended = running.wait()
            line.tried += 1
            # 2 where nothing was begun, 1 where the disk was locked on the way.
            refused += ended.code in (1, 2)
            expected = (0, 2) if moment == 0 else (0, 1)
            if ended.code not in expected or (ended.code and not ended.sentence) or (ended.code and moment == 1):
                line.failures.append(f"{moment}: {ended.code} {ended.errors[-300:]}")
            mount("ro")
            if folder.exists():
                line.failures += _amiss(site, folder, set())
            mount("rw")
            line.failures += _finished(site, folder)
            shutil.rmtree(folder)
    line.notes = f"{refused} runs ended with one sentence and later went on; reading needs no writing"
    return [line]


# ---- damage -----------------------------------------------------------------------------------------------


def _damaged(
    arguments: argparse.Namespace,
    what: str,
    cache: Path,
    damages: list[damage.Damage],
    **options: Any,
) -> list[Line]:
    """Try all on copies of `cache`, in several processes; a line for each kind."""
    share = [damages[start :: arguments.processes] for start in range(arguments.processes)]
    with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
        parts = pool.starmap(_try, [(cache, number, part, options) for number, part in enumerate(share)])
    lines = []
    for kind, count in sorted(damage.total(parts).items()):
        notes = f"{count.refused:,} refused, {count.unchanged:,} change nothing that is trained on"
        if count.unchanged:
            notes += f" (`verify` names {count.verified:,} of them)"
        lines.append(Line(f"{what}: `{kind}`", count.tried, notes, count.wrong + count.broken))
    return lines


def _try(cache: Path, number: int, damages: list[damage.Damage], options: dict[str, Any]) -> dict[str, damage.Count]:
    folder = cache.with_name(f"damaged-{number}")
    shutil.copytree(cache, folder)
    try:
        return damage.try_all(folder, iter(damages), **options)
    finally:
        shutil.rmtree(folder)


def flips(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    def stride(name: str) -> int:
        return arguments.flips * (16 if name.startswith("tokenizer/") else 1)

    files = damage.files_of(site.small)
    return _damaged(arguments, "one byte", site.small, list(damage.flips(files, stride, arguments.seed)))


def cuts(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    files = damage.files_of(site.small)

    def stride(name: str) -> int:
        large = len(files[name]) > BLOCK and name != SKETCH
        return arguments.cuts if large else max(1, arguments.cuts // 16)

    return _damaged(arguments, "cut short", site.small, list(damage.truncations(files, stride)))


def misplaced(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    files, other = damage.files_of(site.whole), damage.files_of(site.other)
    return _damaged(
        arguments, "misplaced", site.whole, list(damage.misplaced(files, other, site.shards))[:: arguments.others]
    )


def edits(site: Site, arguments: argparse.Namespace, dice: random.Random) -> list[Line]:
    files = damage.files_of(site.small)
    names = [name for name in files if name.endswith((".json", ".safetensors")) and not name.startswith("tokenizer/")]
    return _damaged(arguments, "edited", site.small, list(damage.edits(files, names))[:: arguments.others])


_PARTS: dict[str, Callable[[Site, argparse.Namespace, random.Random], list[Line]]] = {
    "kills": kills,
    "calibrations": calibrations,
    "seals": seals,
    "writers": writers,
    "rivals": rivals,
    "full": full,
    "read-only": read_only,
    "flips": flips,
    "cuts": cuts,
    "misplaced": misplaced,
    "edits": edits,
}

if __name__ == "__main__":
    sys.exit(main())
