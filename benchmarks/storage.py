"""What a position costs on disk, what it is worth there, and how fast it goes in and out.

    python -m benchmarks.fidelity teacher --work DIR     first: a tokenizer and a teacher, trained on Python's own text
    python -m benchmarks.storage worth    --work DIR     bytes per token, KL error, angle of the student's gradient
    python -m benchmarks.storage speed    --work DIR     tokens per second of one core's time, writing and reading
    python -m benchmarks.storage show     --work DIR     both as one table, in markdown
    python -m benchmarks.storage columns  --work DIR     each column under other encodings: bytes and time

A setting is `N`, `N+M` (samples) or either with `e0.1` (adaptive N, N the cap) and `b8` (bits), as in `64e0.1b8`.

The teacher is live, but everything goes the way of a cache: our statistics, a shard that is written and read again, our
loader, our loss. KL and gradient are a student's on one batch, compared with the whole distribution; without samples
the tail is read as `prior`. Bytes are those of whole shards, ids and mask included. For the vocabulary of 151,936 half
of all ids are moved, each by itself, to ids that are log-uniform beyond those of the teacher, since text in a larger
vocabulary has tokens of both kinds; that changes the bytes and nothing else. Times are those of one process's CPU, so
that a neighbour does not count.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.fidelity import Bench, Loss, Setting, angle, describe_teacher, gradient
from stages.causal_lm import BodyAndHead
from stages.corpus import Sequence
from stages.divergence import TeacherRows
from stages.objective import Objective
from stages.scored_rows import rows_from_scored
from stages.shard_dataset import COLUMNS, Collator, DecodedShard, StoredSequence, as_tensors, teacher_rows
from stages.statistics import StatisticsOptions, row_statistics, sample_uniforms
from stages.tail import Tail, log_prior
from stages.teacher import ScoredSequence
from storage.manifest import CorpusIdentity, Manifest, PlannedShard, ScoringOptions, TeacherIdentity, TokenizerIdentity
from storage.rows import Rows
from storage.shard import read_shard, split_leaves, write_shard

SETTINGS = ["4+28", "4+28b8", "4+12", "16", "16b8", "64", "64b32", "64b8", "64e0.1", "64e0.1b8", "64e0.3", "64e0.3b8"]
SETTINGS += ["16+8e0.3b8", "128", "128b8"]
WIDE = 151_936
# Bytes per token that others publish, all for vocabularies of 17 or 18 bits.
PUBLISHED = [("DistillKit, compressed, k=50", 127), ("DistillKit, compressed, k=128", 344), ("12 unbiased samples", 36)]


@dataclass(frozen=True)
class Kept:
    """What a cache keeps; see the top of this file."""

    top_n: int
    samples: int = 0
    epsilon: float = 0.0
    bits: int = 16

    @classmethod
    def parse(cls, text: str) -> Kept:
        found = re.fullmatch(r"(\d+)(?:\+(\d+))?(?:e([\d.]+))?(?:b(\d+))?", text)
        if not found:
            raise SystemExit(f"{text}: a setting is like 64, 4+28, 64e0.1 or 64e0.1b8")
        n, m, e, b = found.groups()
        return cls(int(n), int(m or 0), float(e or 0), int(b or 16))

    @property
    def options(self) -> StatisticsOptions:
        return StatisticsOptions(self.top_n, tail_samples=self.samples, tail_epsilon=self.epsilon)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["worth", "speed", "show", "columns"])
    parser.add_argument("--work", type=Path, required=True, help="that of benchmarks.fidelity")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--sequences", type=int, default=96, help="of 256 tokens, for the bytes")
    parser.add_argument("--batch", type=int, default=8, help="sequences of the gradient's batch")
    parser.add_argument("--repeat", type=int, default=8, help="speed: the sequences stand this often in a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sharpen", type=float, default=0.5, help="the teacher's temperature: below 1 surer than it is"
    )
    parser.add_argument("--student-hidden", type=int, default=96)
    parser.add_argument("--student-layers", type=int, default=2)
    parser.add_argument("--start-steps", type=int, default=100, help="cross-entropy steps of the student before")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"worth": worth, "speed": speed, "show": show, "columns": columns}[arguments.step](arguments)


# Shards ---------------------------------------------------------------------------------------------------------------


def score(bench: Bench, kept: Kept, sequences: int, prior: torch.Tensor | None = None) -> list[ScoredSequence]:
    """The statistics of the first sequences of the students' text."""
    scored = []
    for index, row in enumerate(bench.transfer[:sequences]):
        uniforms = torch.from_numpy(sample_uniforms(row.numpy(), kept.options)) if kept.samples else None
        found = row_statistics(
            bench.teacher_logits(row[None]), row[1:], kept.options, uniforms=uniforms, prior_sum=prior
        )
        arrays = {name: value.numpy() for name, value in vars(found).items()}
        arrays = {name: v.astype(np.int32) if v.dtype == np.int64 else v for name, v in arrays.items()}
        scored.append(ScoredSequence(Sequence(index, row.numpy().astype(np.int32), np.ones(255, bool)), **arrays))
    return scored


def manifest_of(kept: Kept, scored: list[ScoredSequence], vocabulary: int) -> Manifest:
    """Of a cache of one shard."""
    tokens = sum(len(s.sequence.input_ids) for s in scored)
    return Manifest(
        teacher=TeacherIdentity(name="benchmark", architecture="Llama", config_sha256="0" * 64),
        tokenizer=TokenizerIdentity(vocabulary_sha256="1" * 64, behaviour_sha256="2" * 64, tokens=vocabulary),
        vocabulary_size=vocabulary,
        corpus=CorpusIdentity(fingerprint="3" * 64, sequences=len(scored), tokens=tokens),
        scoring=ScoringOptions(
            engine="benchmark",
            dtype="float32",
            top_n=kept.top_n,
            tail_samples=kept.samples,
            tail_epsilon=kept.epsilon,
            logprob_bits=kept.bits,
            max_length=256,
        ),
        shards=(PlannedShard(first=0, sequences=len(scored), tokens=tokens),),
    )


def widened(scored: list[ScoredSequence], vocabulary: int) -> list[ScoredSequence]:
    """The same with ids of a vocabulary of WIDE."""
    random = np.random.default_rng(0)

    def moved(ids: np.ndarray) -> np.ndarray:
        beyond = np.exp(random.uniform(np.log(vocabulary), np.log(WIDE), ids.shape)).astype(np.int32)
        return np.where((ids >= 0) & (random.random(ids.shape) < 0.5), beyond, ids)

    return [
        replace(
            s,
            sequence=replace(s.sequence, input_ids=moved(s.sequence.input_ids)),
            top_ids=moved(s.top_ids),
            tail_samples=np.sort(moved(s.tail_samples), 1),
        )
        for s in scored
    ]


def stored_sequences(rows: Rows) -> list[StoredSequence]:
    decoded = DecodedShard(rows)
    return [decoded.sequence(row, 0) for row in range(len(rows))]


# Worth ----------------------------------------------------------------------------------------------------------------


class CacheLoss(Loss):
    """The loss of a student on rows that came out of a shard."""

    def __init__(self, bench: Bench, rows: TeacherRows, tail: Tail) -> None:
        self.bench, self.rows, self.tail = bench, rows, tail

    def __call__(self, student: BodyAndHead, ids: torch.Tensor, seed: int) -> torch.Tensor:
        hidden = student.body(ids)[:, :-1].flatten(0, 1)
        return self.of_cache(student, hidden, self.rows, self.tail)


def worth(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments)
    describe_teacher(bench)
    model = bench.student(0)
    student = BodyAndHead(model)
    ids = bench.transfer[: arguments.batch]
    whole, kl = gradient(model, Loss(bench, Setting("online")), student, ids, 0)
    for name in arguments.settings:
        kept = Kept.parse(name)
        prior = torch.zeros(bench.vocabulary, dtype=torch.float64)
        scored = score(bench, kept, arguments.sequences, prior)
        tokens = 256 * len(scored)
        manifest = manifest_of(kept, scored, bench.vocabulary)
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            shard, plain = Path(folder) / "shard.parquet", Path(folder) / "plain.parquet"
            rows = rows_from_scored(scored, manifest.scoring)
            found["bytes"] = write_shard(shard, rows, manifest, 0).bytes / tokens
            pq.write_table(rows.to_table(manifest.scoring.columns, {}), plain)
            found["plain"] = plain.stat().st_size / tokens
            back = read_shard(shard, manifest, 0)
            wide = widened(scored, bench.vocabulary)
            wide_manifest = manifest_of(kept, wide, WIDE)
            wide_rows = rows_from_scored(wide, wide_manifest.scoring)
            found["wide"] = write_shard(shard, wide_rows, wide_manifest, 0).bytes / tokens
            pq.write_table(wide_rows.to_table(wide_manifest.scoring.columns, {}), plain)
            found["wide_plain"] = plain.stat().st_size / tokens
        found["entries"] = len(back["top_ids"].values) / (tokens - len(scored))
        found["tail"] = float(np.exp(back["tail_logmass"].values.astype(np.float64)).mean())
        tail = Tail("sampled") if kept.samples else Tail("prior", log_prior=log_prior(prior.float()))
        batch = Collator(Objective("kl"), bench.vocabulary).batch(stored_sequences(back)[: arguments.batch])
        grads, value = gradient(model, CacheLoss(bench, teacher_rows(as_tensors(batch)), tail), student, ids, 0)
        angles = {part: angle(grads[part].double(), whole[part].double()) for part in ("all", "body")}
        found |= {"kl_error": value - kl, "angle": angles["all"], "body": angles["body"], "kl": kl}
        record(arguments.work, name, "worth", found)


def record(work: Path, name: str, step: str, found: dict[str, Any]) -> None:
    path = work / "storage.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(name, {})[step] = found
    path.write_text(json.dumps(known, indent=1))
    print(name, {key: round(value, 4) for key, value in found.items()}, flush=True)


# Speed ----------------------------------------------------------------------------------------------------------------


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time of this process, the least of `rounds` in which the ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            found[name].append(time.process_time() - started)
    return {name: min(seconds) for name, seconds in found.items()}


def speed(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments)
    for name in arguments.settings:
        kept = Kept.parse(name)
        once = score(bench, kept, arguments.sequences)
        scored = [
            replace(s, sequence=replace(s.sequence, sequence_id=turn * len(once) + s.sequence.sequence_id))
            for turn in range(arguments.repeat)
            for s in once
        ]
        manifest = manifest_of(kept, scored, bench.vocabulary)
        tokens = 256 * len(scored)
        wanted = [column.name for column in manifest.scoring.columns if column.name in (*COLUMNS, "tail_samples")]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "shard.parquet"
            ways = {
                "write": lambda: write_shard(path, rows_from_scored(scored, manifest.scoring), manifest, 0),  # noqa: B023
                "arrow": lambda: pq.read_table(path, columns=wanted, use_threads=False),  # noqa: B023
                "read": lambda: DecodedShard(read_shard(path, manifest, 0, wanted)),  # noqa: B023
            }
            for way in ways.values():
                way()
            seconds = timed(ways, arguments.rounds)
        found = {way: tokens / value for way, value in seconds.items()}
        record(arguments.work, name, "speed", {**found, "of_arrow": found["read"] / found["arrow"]})


def show(arguments: argparse.Namespace) -> None:
    known = json.loads((arguments.work / "storage.json").read_text())
    print(
        "| kept | entries | tail | bytes, V=8k | bytes, V=152k | Parquet defaults | raw 6N | KL error | angle | ",
        end="",
    )
    print("write | read | of pyarrow |")
    print("| --- |" + " ---: |" * 11)
    for name, found in known.items():
        a, b = found["worth"], found.get("speed")
        cells = [f"`{name}`", f"{a['entries']:.1f}", f"{a['tail']:.3f}", f"{a['bytes']:.1f}", f"{a['wide']:.1f}"]
        cells += [f"{a['plain']:.0f} / {a['wide_plain']:.0f}", f"{6 * a['entries']:.0f}", f"{a['kl_error']:+.4f}"]
        cells += [f"{a['angle']:.2f}°"]
        cells += (
            [f"{b['write'] / 1e3:,.0f}k", f"{b['read'] / 1e3:,.0f}k", f"{b['of_arrow']:.2f}"] if b else ["", "", ""]
        )
        print(f"| {' | '.join(cells)} |")
    for name, size in PUBLISHED:
        print(f"| {name} (published) | | | | {size} |" + " |" * 7)


# Columns --------------------------------------------------------------------------------------------------------------


def columns(arguments: argparse.Namespace) -> None:
    """Of each setting's table, one column at a time: bytes per token, and nanoseconds to write and read."""
    bench = Bench(arguments)
    for name in arguments.settings:
        kept = Kept.parse(name)
        scored = widened(score(bench, kept, arguments.sequences), bench.vocabulary)
        manifest = manifest_of(kept, scored, WIDE)
        table = rows_from_scored(scored, manifest.scoring).to_table(manifest.scoring.columns, {})
        split = split_leaves(manifest.scoring.columns)
        print(f"\n`{name}`, V=151,936: bytes per token / ns to write / ns to read\n")
        ways: dict[str, dict[str, Any]] = {"as is, zstd 3": {}}
        ways |= {f"as is, zstd {level}": {"compression_level": level} for level in (1, 2, 9)}
        ways |= {"as is, lz4": {"compression": "lz4", "compression_level": None}}
        ways |= {how: {"how": how} for how in ("PLAIN", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "dictionary")}
        print("| column | " + " | ".join(ways) + " |\n| --- |" + " ---: |" * len(ways))
        for column in manifest.scoring.columns:
            if column.is_list:
                leaf = f"{column.name}.list.element"
                cells = [
                    _trial(table.select([column.name]), leaf, leaf in split, arguments, **way) for way in ways.values()
                ]
                print(f"| `{column.name}` | {' | '.join(cells)} |", flush=True)


def _trial(
    table: Any, leaf: str, is_split: bool, arguments: argparse.Namespace, how: str | None = None, **options: Any
) -> str:
    given: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 3,
        "write_page_checksum": True,
        "write_statistics": False,
    }
    given |= options
    given |= {"use_dictionary": how == "dictionary"}
    encoding = how or ("BYTE_STREAM_SPLIT" if is_split else "PLAIN")
    if how != "dictionary":
        given["column_encoding"] = {leaf: encoding}
    tokens = 256 * arguments.sequences
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "column.parquet"
        try:
            pq.write_table(table, path, **given)
        except (OSError, ValueError):
            return "-"
        ways = {
            "write": lambda: pq.write_table(table, path, **given),
            "read": lambda: pq.read_table(path, use_threads=False),
        }
        seconds = timed(ways, arguments.rounds)
        size = path.stat().st_size / tokens
    return f"{size:.2f} / {seconds['write'] / tokens * 1e9:.0f} / {seconds['read'] / tokens * 1e9:.0f}"


if __name__ == "__main__":
    main()
