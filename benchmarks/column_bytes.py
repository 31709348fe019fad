"""Bytes that each column of a shard takes per value, at several vocabularies: what `pipeline plan` estimates from.

    python -m benchmarks.column_bytes

The teacher is made up so that any vocabulary can be had: ids in Zipf's order of frequency, as tokenizers number them,
logits of that frequency plus noise of two nats, gold lifted by up to eight. At V=8192 its shards are within 4 % of
those of a teacher that was trained (docs/planning.md).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from stages.corpus import Sequence
from stages.scored_rows import rows_from_scored
from stages.statistics import StatisticsOptions, row_statistics, sample_uniforms
from stages.teacher import ScoredSequence
from storage.manifest import CorpusIdentity, Manifest, ScoringOptions, TeacherIdentity, TokenizerIdentity
from storage.plan import plan_shards
from storage.shard import write_shard

LENGTH = 256
KEPT = ((4, 28), (16, 0), (64, 0))


def scored(ids: np.ndarray, logits: torch.Tensor, options: StatisticsOptions, number: int) -> ScoredSequence:
    uniforms = torch.from_numpy(sample_uniforms(ids, options)) if options.tail_samples else None
    found = row_statistics(logits, torch.from_numpy(ids[1:]).long(), options, uniforms=uniforms)
    return ScoredSequence(
        Sequence(number, ids, np.ones(len(ids) - 1, bool)),
        *(
            value.numpy()
            for value in (
                found.gold_logprob,
                found.tail_logmass,
                found.entropy,
                found.top_ids,
                found.top_logprobs,
                found.tail_logmass_at,
                found.tail_samples,
            )
        ),
    )


def measure(vocabulary: int, tokens: int) -> None:
    random, torch_random = np.random.default_rng(0), torch.Generator().manual_seed(0)
    frequency = 1 / (np.arange(vocabulary) + 2.7)
    frequency /= frequency.sum()
    common = torch.from_numpy(np.log(frequency)).float()
    sequences = random.choice(vocabulary, (max(1, tokens // LENGTH), LENGTH), p=frequency).astype(np.int32)
    found: dict[tuple[int, int], list[ScoredSequence]] = {kept: [] for kept in KEPT}
    for number, ids in enumerate(sequences):
        logits = common + 2 * torch.randn(LENGTH - 1, vocabulary, generator=torch_random)
        gold = torch.from_numpy(ids[1:]).long()
        logits[torch.arange(LENGTH - 1), gold] += 8 * torch.rand(LENGTH - 1, generator=torch_random)
        for top_n, samples in KEPT:
            options = StatisticsOptions(top_n, (), samples)
            found[top_n, samples].append(scored(ids, logits, options, number))
    for (top_n, samples), parts in found.items():
        manifest = Manifest(
            teacher=TeacherIdentity(name="made-up", architecture="None", config_sha256="0" * 64),
            tokenizer=TokenizerIdentity(vocabulary_sha256="1" * 64, behaviour_sha256="2" * 64, tokens=vocabulary),
            vocabulary_size=vocabulary,
            corpus=CorpusIdentity(fingerprint="3" * 64, sequences=len(sequences), tokens=sequences.size),
            scoring=ScoringOptions(
                engine="made-up", dtype="float32", top_n=top_n, tail_samples=samples, max_length=LENGTH
            ),
            shards=plan_shards(np.full(len(sequences), LENGTH), sequences.size),
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "shard.parquet"
            written = write_shard(path, rows_from_scored(parts, manifest.scoring), manifest, 0)
            group = pq.read_metadata(path).row_group(0)
            chunks = [group.column(index) for index in range(group.num_columns)]
        each = {c.path_in_schema.split(".")[0]: c.total_compressed_size / c.num_values for c in chunks}
        print(f"V={vocabulary} N={top_n} M={samples}: {written.bytes / sequences.size:.1f} bytes per token")
        print("  " + ", ".join(f"{name} {size:.3f}" for name, size in each.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[512, 8192, 32768, 151936])
    parser.add_argument("--tokens", type=int, default=8192, help="at the vocabulary of 8192; down to 3072 above it")
    arguments = parser.parse_args()
    for vocabulary in arguments.vocabulary:
        measure(vocabulary, min(arguments.tokens, max(3072, arguments.tokens * 8192 // vocabulary)))


if __name__ == "__main__":
    main()
