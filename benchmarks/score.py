"""Speed and memory of scoring, from token ids to shards on disk: our route against vLLM's own and the ceiling.

    python -m benchmarks.score --vocabulary 32000 --top-n 128 [--prompt-length 512] [--tokens 131072] [--rounds 3]

    generate       plain generation of one token per prompt; no log-probabilities, head on the last position only
    ceiling        body, head on every position and top-k in the same engine, nothing kept: what scoring cannot beat
    pooling        ours: every statistic in vLLM's pooler, written to shards
    flat           vLLM's prompt_logprobs with flat_logprobs, written to shards
    flat-ours      the same by our --vllm-route prompt-logprobs, whose environment is tuned as that of `pooling` is
    dicts          vLLM's prompt_logprobs as dictionaries, walked entry by entry, written to shards
    transformers   our embedded teacher, written to shards

`generate`, `flat` and `dicts` are vLLM as a script starts it, its environment untouched. Shards of 32,768 tokens are
encoded and written while the next one is scored; `cache-teacher` makes them eight times longer. Each route runs in a
process of its own with one engine; the routes take turns, round after round, so that a machine whose speed drifts does
not favour one. Ratios are medians over rounds against the ceiling of the same round. Memory is the peak of the whole
process tree while scoring, above what it was when the engine had started and warmed up. The teacher is random: a
Qwen3-shaped model, hidden 256, 4 layers, its head scaled up so that it is sure of things.

`--tail-samples`, or `--sketch-rank` with `--residual-samples`, are for the routes `pooling` and `transformers` alone; a
sketch is calibrated before the time is taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import PeakMemory
from benchmarks.rounds import report, take_turns

SHARD_TOKENS = 32_768
ROUTES = ("generate", "ceiling", "pooling", "flat", "flat-ours", "dicts", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--top-n", type=int, default=128)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tail-samples", type=int, default=0, help="for each position, from its tail")
    parser.add_argument("--sketch-rank", type=int, default=0, help="codes for each position; 0 for no sketch")
    parser.add_argument("--residual-samples", type=int, default=0, help="for each position, of what the sketch misses")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--serve", choices=ROUTES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if (arguments.tail_samples or arguments.sketch_rank) and {"flat", "flat-ours", "dicts"}.intersection(
        arguments.routes
    ):
        parser.error("vLLM's own routes give log-probabilities alone; choose --routes pooling or transformers")
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = str(make_teacher(Path(folder) / "teacher", arguments))
        show(arguments, measure(arguments))


def make_teacher(path: Path, arguments: argparse.Namespace) -> Path:
    import torch

    from benchmarks.models import random_qwen3

    torch.manual_seed(0)
    model = random_qwen3(arguments.vocabulary, arguments.hidden, arguments.layers, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    model.to(getattr(torch, arguments.dtype)).save_pretrained(path)
    return path


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Rounds of each route. Engines of all routes would not fit in memory at once: one is up at a time."""
    names = ("model", "vocabulary", "top_n", "prompt_length", "tokens", "dtype")
    names += ("tail_samples", "sketch_rank", "residual_samples")
    return take_turns("benchmarks.score", "--serve", arguments.routes, names, arguments)


def show(arguments: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    print(
        f"V={arguments.vocabulary}, N={arguments.top_n}, prompts of {arguments.prompt_length}, "
        f"{arguments.tokens} tokens a round, {arguments.rounds} rounds, {arguments.dtype}, {os.cpu_count()} cores; "
        f"{arguments.tail_samples} tail samples, a sketch of rank {arguments.sketch_rank}, "
        f"{arguments.residual_samples} residual samples\n"
    )
    print("| route | tokens/s | of the ceiling | ours is | memory growth MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for route, rounds in found.items():
        speed = statistics.median(r["tokens_per_second"] for r in rounds)
        memory = statistics.median(r["memory_mb"] for r in rounds)

        def ratio(over: str, under: str) -> str:
            if over not in found or under not in found:
                return ""
            pairs = zip(found[over], found[under], strict=True)
            return f"{statistics.median(a['tokens_per_second'] / b['tokens_per_second'] for a, b in pairs):.2f}"

        print(f"| {route} | {speed:.0f} | {ratio(route, 'ceiling')} | {ratio('pooling', route)}x | {memory:.0f} |")


# One route, in a process of its own ---------------------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the ceiling is a function sent to our own worker
    generator = np.random.default_rng(0)

    def prompts(tokens: int) -> list[Any]:
        from stages.corpus import Sequence

        length = arguments.prompt_length
        return [
            Sequence(i, generator.integers(0, arguments.vocabulary, length).astype(np.int32), np.ones(length - 1, bool))
            for i in range(max(1, tokens // length))
        ]

    job = JOBS[arguments.serve](arguments)
    # Two full steps of the engine, so that its buffers have their size; a sketch is calibrated on them.
    job(prompts(8192))
    work = prompts(arguments.tokens)
    with PeakMemory() as memory:
        started = time.perf_counter()
        job(work)
        seconds = time.perf_counter() - started
    tokens = sum(len(sequence.input_ids) for sequence in work)
    report(tokens_per_second=tokens / seconds, memory_mb=memory.growth_mb)
    # Engines are slow to say good-bye, and one that is left behind holds the pipe that is being read.
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


Job = Callable[[list[Any]], None]


def teacher_job(make: Callable[[], Any], arguments: argparse.Namespace) -> Job:
    """Score as `cache-teacher` does and write the shard."""
    from stages.scored_rows import rows_from_scored

    teacher = make()
    sketched = False

    def score(sequences: list[Any]) -> Any:
        nonlocal sketched
        if arguments.sketch_rank and not sketched:
            teacher.use_sketch(teacher.calibrate(sequences, arguments.sketch_rank, lambda tokens: None))
            sketched = True
        scored = teacher.score(sequences, lambda tokens: None)
        return rows_from_scored(scored.sequences, scoring(arguments, entropy=scored.tail_prior_sum is not None))

    return shard_by_shard(score, arguments)


def shard_by_shard(score: Callable[[list[Any]], Any], arguments: argparse.Namespace) -> Job:
    """As `cache-teacher` does: a shard is encoded and written while the next one is scored."""

    def job(sequences: list[Any]) -> None:
        size = max(1, SHARD_TOKENS // arguments.prompt_length)
        with ThreadPoolExecutor(1) as writer:
            written = [
                writer.submit(write, score(sequences[start : start + size]), arguments)
                for start in range(0, len(sequences), size)
            ]
        for future in written:
            future.result()

    return job


def write(rows: Any, arguments: argparse.Namespace) -> None:
    from storage.shard import split_leaves, write_table

    columns = scoring(arguments, entropy="entropy" in rows.lists).columns
    with tempfile.TemporaryDirectory() as folder:
        table = rows.to_table(columns, {})
        write_table(Path(folder) / "shard.parquet", table, split_leaves(columns))


def scoring(arguments: argparse.Namespace, *, entropy: bool) -> Any:
    from storage.manifest import ScoringOptions, SketchIdentity

    sketch = None
    if arguments.sketch_rank:
        sketch = SketchIdentity(rank=arguments.sketch_rank, residual_samples=arguments.residual_samples, positions=1)
    return ScoringOptions(
        engine="benchmark",
        dtype=arguments.dtype,
        top_n=arguments.top_n,
        tail_samples=arguments.tail_samples,
        sketch=sketch,
        entropy=entropy,
        max_length=1 << 20,
    )


def kept(arguments: argparse.Namespace) -> Any:
    from stages.statistics import StatisticsOptions

    return StatisticsOptions(
        arguments.top_n,
        tail_samples=arguments.tail_samples,
        sketch_rank=arguments.sketch_rank,
        residual_samples=arguments.residual_samples,
    )


def vllm_teacher(arguments: argparse.Namespace, route: str) -> Any:
    from stages.teacher_vllm import VllmTeacher

    return VllmTeacher(
        arguments.model,
        kept(arguments),
        max_length=arguments.prompt_length,
        dtype=arguments.dtype,
        route=route,  # type: ignore[arg-type]
    )


def transformers_teacher(arguments: argparse.Namespace) -> Any:
    from stages.teacher_transformers import TransformersTeacher

    return TransformersTeacher(arguments.model, kept(arguments), dtype=arguments.dtype, batch_tokens=4096)


def only_top_k(worker: Any) -> None:
    """Runs in the worker: the pooler's collector computes logits and their top-k, and keeps nothing."""
    collector = worker.model_runner.get_model().pooler.collector
    from stages.statistics import rows_per_slice

    def collect(hidden: Any, chunks: Any) -> Any:
        size = rows_per_slice(collector.vocabulary_size)
        for start in range(0, len(hidden), size):
            collector.compute_logits(hidden[start : start + size]).float().topk(collector.options.top_n)
        nothing = hidden.new_zeros((0, 3)).float(), hidden.new_zeros((0, 2 * collector.options.top_n)).float()
        return [nothing for _ in chunks]

    collector.collect = collect


def ceiling_job(arguments: argparse.Namespace) -> Job:
    teacher = vllm_teacher(arguments, "pooling")
    teacher._engine.collective_rpc(only_top_k)

    def job(sequences: list[Any]) -> None:
        for _ in teacher._run(sequences):
            pass

    return job


def generating(arguments: argparse.Namespace, **more: Any) -> Any:
    from stages.vllm_engine import import_vllm, on_cpu

    import_vllm()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # as ours has it, for the sake of the memory column
    from vllm import LLM

    return LLM(
        arguments.model,
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        enforce_eager=on_cpu(),
        enable_prefix_caching=False,
        max_model_len=arguments.prompt_length + 1,
        disable_log_stats=True,
        **more,
    )


def generate_job(arguments: argparse.Namespace) -> Job:
    from vllm import SamplingParams

    llm = generating(arguments)
    parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def job(sequences: list[Any]) -> None:
        prompts: Any = [{"prompt_token_ids": s.input_ids.tolist()} for s in sequences]
        llm.generate(prompts, parameters, use_tqdm=False)

    return job


def logprobs_job(arguments: argparse.Namespace, flat: bool) -> Job:
    """What scripts do: `prompt_logprobs`, and a loop over its dictionaries unless they are asked for flat."""
    from vllm import SamplingParams

    from stages.scored_rows import rows_from_scored
    from stages.statistics import StatisticsOptions
    from stages.vllm_prompt_logprobs import scored_from_flat

    options = StatisticsOptions(arguments.top_n)
    llm = generating(arguments, max_logprobs=options.top_n, hf_overrides={"head_dtype": "float32"})
    parameters = SamplingParams(
        max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=options.top_n, flat_logprobs=flat
    )

    def score(sequences: list[Any]) -> Any:
        prompts: Any = [{"prompt_token_ids": s.input_ids.tolist()} for s in sequences]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        scored = [
            scored_from_flat(sequence, output.prompt_logprobs, options, arguments.vocabulary)
            if flat
            else scored_from_dicts(sequence, output.prompt_logprobs, arguments)
            for sequence, output in zip(sequences, outputs, strict=True)
        ]
        return rows_from_scored(scored, scoring(arguments, entropy=False))

    return shard_by_shard(score, arguments)


def scored_from_dicts(sequence: Any, prompt_logprobs: Any, arguments: argparse.Namespace) -> Any:
    from stages.statistics import StatisticsOptions
    from stages.vllm_prompt_logprobs import scored_from_logprobs

    shape = len(sequence.input_ids) - 1, arguments.top_n
    ids, logprobs, gold = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    for position, entries in enumerate(prompt_logprobs[1:]):
        gold[position] = entries[int(sequence.input_ids[position + 1])].logprob
        ranked = sorted(entries.items(), key=lambda item: item[1].rank)[: arguments.top_n]
        for rank, (token, entry) in enumerate(ranked):
            ids[position, rank] = token
            logprobs[position, rank] = entry.logprob
    return scored_from_logprobs(sequence, ids, logprobs, gold, StatisticsOptions(arguments.top_n), arguments.vocabulary)


JOBS: dict[str, Callable[[argparse.Namespace], Job]] = {
    "generate": generate_job,
    "ceiling": ceiling_job,
    "pooling": lambda arguments: teacher_job(lambda: vllm_teacher(arguments, "pooling"), arguments),
    "flat": lambda arguments: logprobs_job(arguments, flat=True),
    "flat-ours": lambda arguments: teacher_job(lambda: vllm_teacher(arguments, "prompt-logprobs"), arguments),
    "dicts": lambda arguments: logprobs_job(arguments, flat=False),
    "transformers": lambda arguments: teacher_job(lambda: transformers_teacher(arguments), arguments),
}

if __name__ == "__main__":
    main()
