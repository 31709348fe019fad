"""What feeding a student costs: `python -m benchmarks.loader`.

A cache of made-up distributions (lengths as in chats: log-normal) is read in six ways, each in one process:

    arrow     the columns that training reads, as Arrow tables, and nothing more
    sha256    every file compared with its receipt (`--checksums start` does it once, before the training)
    no CRC    as `arrays`, without the checksums of the pages (`--checksums off`)
    arrays    the same as numpy arrays, structure checked
    decoded   also every value checked, as when a shard is first met
    batches   collated batches of one padded epoch, after the first epoch has checked the values

and then a small student trains from it with padded, length-grouped and packed batches of about the same tokens. Rounds
take turns; numbers are medians over rounds, ratios are medians of each round's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--top-n", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=2_000)
    parser.add_argument("--mean-length", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--shard-tokens", type=int, default=1 << 17)
    parser.add_argument("--hidden", type=int, default=128, help="of the student")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6, help="training steps per round and way of batching")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    # Every part is one process, and a loader has one core of its own.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", arguments)
        tokens = cache.manifest.corpus.tokens
        print(
            f"V={arguments.vocabulary}, N={arguments.top_n}, {len(cache.manifest.shards)} shards, {tokens:,} tokens, "
            f"mean length {tokens / cache.manifest.corpus.sequences:.0f}, {arguments.rounds} rounds, "
            f"{os.cpu_count()} cores\n"
        )
        ways = {**readers(cache, arguments), **trainings(cache, arguments)}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                done = way()
                speeds[name].append(done / (time.perf_counter() - started))
    print("| | tokens/s | of arrow | times the padded student |")
    print("| --- | ---: | ---: | ---: |")
    for name, found in speeds.items():
        of_arrow = statistics.median(a / b for a, b in zip(found, speeds["arrow"], strict=True))
        of_student = statistics.median(a / b for a, b in zip(found, speeds["student, padded"], strict=True))
        print(f"| {name} | {statistics.median(found):,.0f} | {of_arrow:.3f} | {of_student:.2f} |")


def make_cache(path: Path, arguments: argparse.Namespace) -> Any:
    """A cache that is true to the format: Zipf-like distributions over random ids, ids and gold drawn from them."""
    from storage.cache import Cache
    from storage.manifest import CorpusIdentity, Manifest, ScoringOptions, TeacherIdentity, TokenizerIdentity
    from storage.plan import plan_shards
    from storage.rows import Ragged, Rows

    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(arguments.mean_length) - 0.5, 1.0, arguments.sequences)
    lengths = np.clip(lengths, 8, arguments.max_length).astype(np.int64)
    n, vocabulary = arguments.top_n, arguments.vocabulary
    manifest = Manifest(
        teacher=TeacherIdentity(name="made up", architecture="None", config_sha256="0" * 64),
        tokenizer=TokenizerIdentity(vocabulary_sha256="1" * 64, behaviour_sha256="2" * 64, tokens=vocabulary),
        vocabulary_size=vocabulary,
        corpus=CorpusIdentity(fingerprint="3" * 64, sequences=len(lengths), tokens=int(lengths.sum())),
        scoring=ScoringOptions(engine="made up", dtype="float32", top_n=n, max_length=arguments.max_length),
        shards=plan_shards(lengths, arguments.shard_tokens),
    )
    cache = Cache.create_or_resume(path, manifest)
    for index, planned in enumerate(manifest.shards):
        own = lengths[planned.first : planned.first + planned.sequences]
        positions = int((own - 1).sum())
        # Gold is the entry of rank 0 to N-1; ids of one position differ, since they are a run from a random start.
        logits = -np.sort(random.exponential(2.0, (positions, n)).cumsum(1) * 0.1, axis=1)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True) * 1.05)
        log_p = log_p.astype(np.float16)
        ids = (random.integers(0, vocabulary, (positions, 1)) + np.arange(n)) % vocabulary
        rank = random.integers(0, n, positions)
        rows_of = np.arange(positions)
        gold = ids[rows_of, rank]
        starts = np.cumsum(own) - own
        first = np.zeros(int(own.sum()), bool)
        first[starts] = True
        input_ids = np.zeros(len(first), np.int64)
        input_ids[~first] = gold
        offsets = np.concatenate([[0], np.cumsum(own - 1)])
        tail = np.log1p(-np.exp(log_p.astype(np.float64)).sum(1))
        lists = {
            "input_ids": Ragged(input_ids, np.concatenate([[0], np.cumsum(own)])),
            "loss_mask": Ragged(np.ones(positions, bool), offsets),
            "gold_logprob": Ragged(log_p[rows_of, rank].astype(np.float32), offsets),
            "tail_logmass": Ragged(tail, offsets),
            "entropy": Ragged(np.ones(positions), offsets),
            "top_count": Ragged(np.full(positions, n), offsets),
            "top_ids": Ragged(ids.ravel(), offsets * n),
            "top_logprobs": Ragged(log_p.ravel(), offsets * n),
        }
        rows = Rows(np.arange(planned.first, planned.first + planned.sequences), lists)
        cache.write_shard(index, rows, None, 0.0)
    cache.seal("made up\n")
    return cache


def readers(cache: Any, arguments: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Each reads every shard once and returns its tokens."""
    import pyarrow.parquet as pq

    from stages.batching import BatchPlan, EpochBatches
    from stages.mixing import Mixture
    from stages.objective import Objective
    from stages.shard_dataset import COLUMNS, Collator, ShardDataset
    from storage.shard import value_problems

    shards, tokens = range(len(cache.manifest.shards)), cache.manifest.corpus.tokens
    mixture = Mixture([ShardDataset(cache, np.arange(cache.manifest.corpus.sequences))])
    batches = EpochBatches(mixture, BatchPlan(sequences=batch_size(arguments)), 0)
    collate = Collator(Objective(), arguments.vocabulary)

    def arrow() -> int:
        for index in shards:
            pq.read_table(cache.shard_path(index), columns=list(COLUMNS), use_threads=False)
        return tokens

    def sha256() -> int:
        for index in shards:
            cache.check_file(index)
        return tokens

    def unchecked_pages() -> int:
        for index in shards:
            cache.read_shard(index, COLUMNS, page_checksums=False)
        return tokens

    def arrays() -> int:
        for index in shards:
            cache.read_shard(index, COLUMNS)
        return tokens

    def decoded() -> int:
        for index in shards:
            assert not value_problems(cache.read_shard(index, COLUMNS), cache.manifest)
        return tokens

    def collated() -> int:
        for part in mixture.parts:
            part._decoded.clear()
        for batch in batches:
            collate(mixture.__getitems__(batch))
        return tokens

    collated()
    return {
        "arrow": arrow,
        "sha256": sha256,
        "no CRC": unchecked_pages,
        "arrays": arrays,
        "decoded": decoded,
        "batches": collated,
    }


def batch_size(arguments: argparse.Namespace) -> int:
    return max(1, arguments.batch_tokens // arguments.mean_length)


def trainings(cache: Any, arguments: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Forward and backward passes of one student over the first batches of an epoch, loading included."""
    import torch

    from benchmarks.models import random_qwen3
    from stages.batching import BATCHINGS, BatchPlan, EpochBatches
    from stages.distillation_forward import install_distillation
    from stages.divergence import divergences, teacher_terms
    from stages.head_loss import head_loss
    from stages.mixing import Mixture
    from stages.objective import Objective, coefficients, weighted_sum
    from stages.shard_dataset import Collator, ShardDataset, as_tensors, sequence_lengths, teacher_rows

    torch.manual_seed(0)
    student = random_qwen3(arguments.vocabulary, arguments.hidden, arguments.layers, tied=True, head_dim=32)
    vocabulary = install_distillation(student).vocabulary_size
    lengths = sequence_lengths(cache)
    mixture = Mixture([ShardDataset(cache, np.arange(len(lengths)))])

    def step(batch: dict[str, Any]) -> int:
        rows, weights = teacher_rows(batch), coefficients(Objective(), batch["is_hard"])
        teacher = teacher_terms(rows, "bucket")

        def from_hidden(hidden: Any, head: Any, parameters: Any) -> Any:
            def loss_of(found: Any, part: slice) -> Any:
                return weighted_sum(divergences(found, teacher[part]), weights[part])

            return head_loss(hidden, head, parameters, rows, loss_of, vocabulary_size=vocabulary)

        inputs = {name: batch[name] for name in ("input_ids", "rows", "position_ids") if name in batch}
        student(distillation=from_hidden, **inputs).backward()
        student.zero_grad()
        return len(rows)

    def training(batching: Any) -> Callable[[], int]:
        plan = BatchPlan(batching, batch_size(arguments), max(arguments.batch_tokens, int(lengths.max())))
        batches = iter([])
        epochs = EpochBatches(mixture, plan, 0, lengths)  # the first epoch, again and again
        collate = Collator(Objective(), vocabulary, packed=batching == "packed")

        def run() -> int:
            nonlocal batches
            tokens = 0
            for _ in range(arguments.steps):
                batch = next(batches, None)
                if batch is None:
                    batches = iter(epochs)
                    batch = next(batches)
                tokens += step(as_tensors(collate.batch(mixture.__getitems__(batch))))
            return tokens

        return run

    found = {f"student, {batching}": training(batching) for batching in BATCHINGS}
    for warm in found.values():
        warm()
    return found


if __name__ == "__main__":
    main()
