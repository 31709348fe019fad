"""The vLLM general plugin: every decoder that vLLM serves, once more as a model that pools teacher statistics.

vLLM runs `register` in each of its processes (entry point group `vllm.general_plugins`). For an architecture `A` of
its registry there is then `TeacherStatisticsA`: a subclass of the registered class, made on first use, whose pooler
applies the model's own `compute_logits` to slices of rows and keeps `row_statistics` of them. A request gives back
one packed float32 tensor; a `[tokens, vocabulary]` tensor never exists.

What travels where:

- the statistics options in vLLM's `additional_config`, under the key `teacher_logit_cache`;
- the loss mask of a sequence in its request's `PoolingParams.extra_kwargs`, so that only masked-in positions send
  top-N entries; a request without one (the HTTP server's) gets them at every scored position;
- the summed tail distribution of a shard stays on the worker until `WorkerExtension` is asked for it.

A module without vLLM at its top: `PackedStatistics` is also what a client of a server reads.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.statistics import RowStatistics, StatisticsOptions, row_statistics, rows_per_slice, sample_uniforms

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLUGIN_NAME = "teacher_logit_cache"
ARCHITECTURE_PREFIX = "TeacherStatistics"
# The key in `additional_config` and in `PoolingParams.extra_kwargs`.
CONFIG_KEY = "teacher_logit_cache"
# float32 holds integers exactly below this, and packed ids are float32.
MAX_VOCABULARY = 1 << 24

_MAGIC = 7105.0
_FORMAT = 2.0
_SEED_DIGITS = 3  # base 2**22, so each is exact in float32
_FIXED_HEADER = 10 + _SEED_DIGITS

# Bytes of fp32 logits that the head makes at a time, on an accelerator and on a CPU: more rows share one reading of
# its weights. The statistics go over them many times, on a CPU in blocks that its caches hold.
_HEAD_BYTES = (256 << 20, 128 << 20)
_CACHED_BYTES = 16 << 20


# What travels -------------------------------------------------------------------------------------------------------


def options_to_config(options: StatisticsOptions) -> dict[str, Any]:
    """The options as `additional_config[CONFIG_KEY]`, plain JSON."""
    return {
        "top_n": options.top_n,
        "temperatures": list(options.temperatures),
        "tail_samples": options.tail_samples,
        "seed": options.seed,
        "tail_epsilon": options.tail_epsilon,
        "min_n": options.min_n,
    }


def options_from_config(config: Any) -> StatisticsOptions:
    """Raises ValueError where `additional_config` does not hold ours."""
    try:
        ours = config[CONFIG_KEY]
        return StatisticsOptions(
            top_n=int(ours["top_n"]),
            temperatures=tuple(float(t) for t in ours.get("temperatures", ())),
            tail_samples=int(ours.get("tail_samples", 0)),
            seed=int(ours.get("seed", 0)),
            tail_epsilon=float(ours.get("tail_epsilon", 0.0)),
            min_n=int(ours.get("min_n", 1)),
        )
    except (KeyError, TypeError, ValueError):
        example = f'{{"{CONFIG_KEY}": {{"top_n": 64}}}}'
        raise ValueError(f"vLLM's additional_config must hold the statistics options: {example}") from None


def request_extras(key: int, loss_mask: np.ndarray) -> dict[str, Any]:
    """`PoolingParams.extra_kwargs` of a sequence. `key` is unique among the sequences of one shard."""
    return {CONFIG_KEY: {"key": key, "stored": np.packbits(loss_mask).tobytes()}}


@dataclass(frozen=True)
class PackedStatistics:
    """What the pooler says about one sequence of L ids: its R = L-1 scored positions, P of them with entries.

    Flat float32: a header, `dense [R, 3 + temperatures]` (gold_logprob, tail_logmass, entropy, tail_logmass_at...) and
    `entries [P, 2N + M]` (top ids, top log-probabilities, tail samples). Ids are integers in float32.
    """

    options: StatisticsOptions
    vocabulary_size: int
    dense: np.ndarray
    entries: np.ndarray

    @property
    def top_ids(self) -> np.ndarray:
        """int32 [P, N], -1 beyond what a position keeps"""
        return self.entries[:, : self.options.top_n].astype(np.int32)

    @property
    def top_logprobs(self) -> np.ndarray:
        """float32 [P, N]"""
        return self.entries[:, self.options.top_n : 2 * self.options.top_n].copy()

    @property
    def tail_samples(self) -> np.ndarray:
        """int32 [P, M]"""
        return self.entries[:, 2 * self.options.top_n :].astype(np.int32)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> PackedStatistics:
        """Raises ValueError for anything but the whole output of this pooler; `packed` is float32 `[anything]`."""
        packed = np.asarray(packed)
        if packed.dtype != np.float32 or packed.ndim != 1 or len(packed) < _FIXED_HEADER or packed[0] != _MAGIC:
            raise ValueError("not the output of the teacher-statistics pooler")
        if packed[1] != _FORMAT:
            raise ValueError(f"packed statistics of format {packed[1]:g}, this version reads {_FORMAT:g}")
        if not np.isfinite(packed[:_FIXED_HEADER]).all():
            raise ValueError("damaged header of packed statistics")
        vocabulary, rows, stored, top_n, temperatures, samples, min_n = (int(x) for x in packed[2:9])
        seed = sum(int(digit) << (22 * i) for i, digit in enumerate(packed[10:_FIXED_HEADER]))
        body = _FIXED_HEADER + temperatures
        dense_size, entries_size = rows * (3 + temperatures), stored * (2 * top_n + samples)
        if (
            min(vocabulary, rows, stored, top_n, temperatures, samples, min_n) < 0
            or len(packed) != body + dense_size + entries_size
        ):
            raise ValueError(f"packed statistics of {len(packed)} numbers, their header promises others")
        # These come back as the shortest decimal that float32 cannot tell from them.
        temperature_values = tuple(float(str(t)) for t in packed[_FIXED_HEADER:body])
        options = StatisticsOptions(top_n, temperature_values, samples, seed, float(str(packed[9])), min_n)
        return cls(
            options,
            vocabulary,
            packed[body : body + dense_size].reshape(rows, 3 + temperatures),
            packed[body + dense_size :].reshape(stored, 2 * top_n + samples),
        )


def _header(options: StatisticsOptions, vocabulary: int, rows: int, stored: int) -> list[float]:
    digits = [(options.seed >> (22 * i)) & ((1 << 22) - 1) for i in range(_SEED_DIGITS)]
    counts = [vocabulary, rows, stored, options.top_n, len(options.temperatures), options.tail_samples, options.min_n]
    numbers = [*counts, options.tail_epsilon, *digits]
    return [_MAGIC, _FORMAT, *map(float, numbers), *options.temperatures]


# The statistics of one step of the engine -----------------------------------------------------------------------------


@dataclass
class Chunk:
    """The rows of one request in a step: hidden states of positions `start..stop-1` of a prompt of L ids."""

    prompt_ids: np.ndarray  # int64 [L]
    start: int
    stop: int
    stored: np.ndarray | None = None  # bool [L-1]; None stores every scored position
    key: int | None = None  # of the sequence within its shard; None leaves it out of the tail prior

    def scored(self) -> range:
        """Its positions that have a gold token."""
        return range(self.start, max(self.start, min(self.stop, len(self.prompt_ids) - 1)))

    def stored_mask(self) -> np.ndarray:
        """bool, one per scored position of the chunk."""
        scored = self.scored()
        return np.ones(len(scored), bool) if self.stored is None else self.stored[scored.start : scored.stop]


class StatisticsCollector:
    """Turns the hidden states of a step into statistics; knows nothing of vLLM.

    compute_logits: `[C, H] -> [C, V]`, or None on the tensor-parallel ranks that only take part in the gather.
    collects: whether this rank keeps anything. Every rank must call `collect` with the same chunks.
    """

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        options: StatisticsOptions,
        vocabulary_size: int,
        *,
        collects: bool = True,
    ) -> None:
        if not 1 <= options.top_n <= vocabulary_size:
            raise ValueError(f"top_n is {options.top_n}, but the vocabulary has {vocabulary_size} ids")
        if vocabulary_size >= MAX_VOCABULARY:
            raise ValueError(f"a vocabulary of {vocabulary_size} ids does not fit float32 packing")
        self.compute_logits = compute_logits
        self.options = options
        self.vocabulary_size = vocabulary_size
        self.collects = collects
        self._prior_sum: torch.Tensor | None = None
        self._prior_positions = 0
        self._prior_reached: dict[int, int] = {}

    def reset_prior(self) -> None:
        """Start the tail prior of a shard."""
        self._prior_sum = None
        self._prior_positions = 0
        self._prior_reached = {}

    def take_prior(self) -> tuple[int, np.ndarray | None]:
        """(positions summed, float64 [V] or None where there were none), and start again."""
        positions, total = self._prior_positions, self._prior_sum
        self.reset_prior()
        return positions, None if total is None else total.cpu().numpy()

    def collect(self, hidden: torch.Tensor, chunks: Sequence[Chunk]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """For each chunk `(dense [scored, 3 + temperatures], entries [stored, 2N + M])`; None on other ranks.

        hidden: `[tokens, H]`, the rows of the chunks one after another.
        """
        tokens = len(hidden)
        gold = np.zeros(tokens, np.int64)
        entry = np.zeros(tokens, bool)
        in_prior = np.zeros(tokens, bool)
        uniforms = np.zeros((tokens, self.options.tail_samples))
        begin = 0
        for chunk in chunks:
            scored, stored = chunk.scored(), chunk.stored_mask()
            rows = slice(begin, begin + len(scored))
            gold[rows] = chunk.prompt_ids[scored.start + 1 : scored.stop + 1]
            entry[rows] = stored
            if self.options.tail_samples and stored.any():
                uniforms[rows] = sample_uniforms(chunk.prompt_ids, self.options)[scored.start : scored.stop]
            if chunk.key is not None:
                # A preempted request is scored again from its start: count a position once.
                reached = self._prior_reached.get(chunk.key, 0)
                in_prior[rows] = stored & (np.arange(scored.start, scored.stop) >= reached)
                self._prior_reached[chunk.key] = max(reached, scored.stop)
            begin += chunk.stop - chunk.start

        device = hidden.device
        gold_rows = torch.from_numpy(gold).to(device)
        prior_rows = torch.from_numpy(in_prior).to(device) if in_prior.any() else None
        uniform_rows = torch.from_numpy(uniforms).to(device) if self.options.tail_samples else None
        entry_rows = np.flatnonzero(entry)
        entry_index = torch.from_numpy(entry_rows).to(device)

        dense, entries = [], []
        size = rows_per_slice(self.vocabulary_size, _HEAD_BYTES[device.type == "cpu"])
        for start in range(0, tokens, size):
            stop = min(start + size, tokens)
            # Every tensor-parallel rank takes part in the gather inside.
            logits = self.compute_logits(hidden[start:stop])
            if not self.collects:
                continue
            if logits is None or logits.shape[1] != self.vocabulary_size:
                width = None if logits is None else logits.shape[1]
                raise RuntimeError(
                    f"the model's logits are {width} wide, its configuration says {self.vocabulary_size}"
                )
            # float32 within a slice, float64 over the slices of a shard.
            slice_prior = None if prior_rows is None else hidden.new_zeros(self.vocabulary_size, dtype=torch.float32)
            statistics = self._statistics(
                logits,
                gold_rows[start:stop],
                None if uniform_rows is None else uniform_rows[start:stop],
                None if prior_rows is None else prior_rows[start:stop],
                slice_prior,
            )
            del logits
            if slice_prior is not None:
                self._add_to_prior(slice_prior)
            first, last = np.searchsorted(entry_rows, (start, stop))
            dense.append(_dense(statistics))
            entries.append(_entries(statistics, entry_index[first:last] - start))
        if not self.collects:
            return [None] * len(chunks)
        self._prior_positions += int(in_prior.sum())
        return _split(torch.cat(dense), torch.cat(entries), chunks)

    def _add_to_prior(self, tail_sum: torch.Tensor) -> None:
        if self._prior_sum is None:
            self._prior_sum = tail_sum.double()
        else:
            self._prior_sum += tail_sum

    def _statistics(
        self,
        logits: torch.Tensor,
        gold: torch.Tensor,
        uniforms: torch.Tensor | None,
        prior_rows: torch.Tensor | None,
        prior_sum: torch.Tensor | None,
    ) -> RowStatistics:
        """`row_statistics`, in blocks that a CPU's caches hold, and in halves where the whole does not fit."""
        rows = len(logits)
        block = rows_per_slice(self.vocabulary_size, _CACHED_BYTES) if logits.device.type == "cpu" else rows
        if rows <= block:
            try:
                return row_statistics(
                    logits, gold, self.options, uniforms=uniforms, prior_sum=prior_sum, prior_rows=prior_rows
                )
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            torch.cuda.empty_cache()
            block = rows // 2
        parts = [
            self._statistics(
                logits[start : start + block],
                gold[start : start + block],
                None if uniforms is None else uniforms[start : start + block],
                None if prior_rows is None else prior_rows[start : start + block],
                prior_sum,
            )
            for start in range(0, rows, block)
        ]
        return RowStatistics(**{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])})


def _dense(s: RowStatistics) -> torch.Tensor:
    return torch.cat([torch.stack([s.gold_logprob, s.tail_logmass, s.entropy], 1), s.tail_logmass_at], 1)


def _entries(s: RowStatistics, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([s.top_ids[rows].float(), s.top_logprobs[rows], s.tail_samples[rows].float()], 1)


def _split(
    dense: torch.Tensor, entries: torch.Tensor, chunks: Sequence[Chunk]
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    parts: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    row = entry = 0
    for chunk in chunks:
        stored = int(chunk.stored_mask().sum())
        parts.append((dense[row : row + len(chunk.scored())], entries[entry : entry + stored]))
        row += chunk.stop - chunk.start
        entry += stored
    return parts


# vLLM -----------------------------------------------------------------------------------------------------------------


def register() -> None:
    """The entry point. Cheap: models are named here and made on first use. May run more than once."""
    from vllm import ModelRegistry

    for architecture in list(ModelRegistry.get_supported_archs()):
        if not architecture.startswith(ARCHITECTURE_PREFIX):
            ModelRegistry.register_model(
                statistics_architecture(architecture), f"{__name__}:{_class_name(architecture)}"
            )
    try:
        # Some architectures adjust the engine's configuration (hybrid caches, attention back-ends) by their name.
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        for architecture, adjust in list(MODELS_CONFIG_MAP.items()):
            MODELS_CONFIG_MAP.setdefault(statistics_architecture(architecture), adjust)
    except ImportError:
        warnings.warn("this vLLM keeps its per-architecture configuration elsewhere; not carried over", stacklevel=1)


def statistics_architecture(architecture: str) -> str:
    """The name under which `architecture` pools teacher statistics; goes first in `hf_overrides["architectures"]`."""
    return ARCHITECTURE_PREFIX + architecture


def _class_name(architecture: str) -> str:
    # vLLM remembers what it learned about a class on disk, by class name and a hash of this file: the version of
    # vLLM must be part of the name.
    import vllm

    return f"{ARCHITECTURE_PREFIX}{architecture}__{re.sub(r'[^0-9A-Za-z]', '_', vllm.__version__)}"


def __getattr__(name: str) -> Any:
    """`TeacherStatisticsLlamaForCausalLM__0_32_0`: the model class that vLLM was told to find here."""
    if name.startswith(ARCHITECTURE_PREFIX) and "__" in name:
        return _model_class(name.removeprefix(ARCHITECTURE_PREFIX).rsplit("__", 1)[0])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class(architecture: str) -> type:
    from vllm import ModelRegistry

    base: Any = ModelRegistry.models[architecture].load_model_cls()
    if not hasattr(base, "compute_logits"):
        raise TypeError(f"{architecture} has no compute_logits: it is not a language model")

    class TeacherStatistics(base):
        """`base`, with its head on, as a pooling model."""

        is_pooling_model = True
        default_seq_pooling_type = "LAST"
        default_tok_pooling_type = "ALL"
        score_type = "bi-encoder"

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self.pooler = _make_pooler(self.compute_logits, vllm_config)

    # vLLM asks a class for its name to tell the transformers back-end from its own models.
    TeacherStatistics.__name__ = base.__name__
    TeacherStatistics.__qualname__ = _class_name(architecture)
    return TeacherStatistics


def _make_pooler(compute_logits: Callable[[torch.Tensor], torch.Tensor | None], config: VllmConfig) -> torch.nn.Module:
    from vllm.distributed import get_tensor_model_parallel_rank

    collector = StatisticsCollector(
        compute_logits,
        options_from_config(config.additional_config),
        config.model_config.get_vocab_size(),
        collects=get_tensor_model_parallel_rank() == 0,
    )
    return _pooler_class()(collector)


@functools.cache
def _pooler_class() -> type:
    from vllm.model_executor.layers.pooler import PoolingParamsUpdate
    from vllm.model_executor.layers.pooler.abstract import Pooler

    class StatisticsPooler(Pooler):
        """One packed tensor per finished request, None for one whose prefill goes on."""

        def __init__(self, collector: StatisticsCollector) -> None:
            super().__init__()
            self.collector = collector

        def get_supported_tasks(self) -> set[Any]:
            return {"token_embed"}

        def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
            return PoolingParamsUpdate(requires_token_ids=True)

        def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
            cursor = pooling_metadata.get_pooling_cursor()
            scheduled = cursor.num_scheduled_tokens_cpu.tolist()
            ends = cursor.seq_lens_cpu.tolist()
            finished = [end == length for end, length in zip(ends, pooling_metadata.prompt_lens.tolist(), strict=True)]
            prompts = pooling_metadata.get_prompt_token_ids_cpu()
            chunks = [
                _chunk(prompt, end - count, end, params.extra_kwargs)
                for prompt, count, end, params in zip(
                    prompts, scheduled, ends, pooling_metadata.pooling_params, strict=True
                )
            ]
            parts = self.collector.collect(hidden_states[: sum(scheduled)], chunks)
            if not self.collector.collects:
                return [hidden_states.new_zeros(0) if done else None for done in finished]
            for chunk, part, state in zip(chunks, parts, pooling_metadata.pooling_states, strict=True):
                _append(state.hidden_states_cache, chunk, part)
            return self._pack(pooling_metadata.pooling_states, finished, hidden_states.device)

        def _pack(self, states: Sequence[Any], finished: list[bool], device: torch.device) -> list[torch.Tensor | None]:
            """Concatenate the pieces of each finished request behind a header, and drop them."""
            collector = self.collector
            caches = [state.hidden_states_cache for state, done in zip(states, finished, strict=True) if done]
            headers = [
                _header(
                    collector.options,
                    collector.vocabulary_size,
                    sum(len(dense) for dense in cache[0::2]),
                    sum(len(entries) for entries in cache[1::2]),
                )
                for cache in caches
            ]
            uploaded = iter(torch.tensor(headers, dtype=torch.float32, device=device)) if headers else iter(())
            outputs: list[torch.Tensor | None] = []
            for state, done in zip(states, finished, strict=True):
                if done:
                    cache = state.hidden_states_cache
                    pieces = [next(uploaded), *(p.flatten() for p in cache[0::2]), *(p.flatten() for p in cache[1::2])]
                    outputs.append(torch.cat(pieces))
                    state.clean()
                else:
                    outputs.append(None)
            return outputs

    return StatisticsPooler


def _chunk(prompt: torch.Tensor, start: int, stop: int, extras: dict[str, Any] | None) -> Chunk:
    ours = (extras or {}).get(CONFIG_KEY)
    chunk = Chunk(prompt.numpy(), start, stop)
    if ours is not None:
        packed = np.frombuffer(ours["stored"], np.uint8)
        chunk.stored = np.unpackbits(packed, count=len(chunk.prompt_ids) - 1).astype(bool)
        chunk.key = int(ours["key"])
    return chunk


def _append(cache: list[torch.Tensor], chunk: Chunk, part: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Keep a chunk's pieces with its request: dense and entries in turn."""
    assert part is not None
    if chunk.start == 0:
        cache.clear()
    reached = sum(len(dense) for dense in cache[0::2])
    if reached != chunk.start:
        raise RuntimeError(
            f"a request goes on at position {chunk.start}, but {reached} are scored: part of it was not computed "
            "(prefix cache)"
        )
    # Slices share the step's tensors; a finished request copies them at once, another must not hold them all.
    whole = len(chunk.scored()) == chunk.stop - chunk.start
    cache.extend(piece.clone() if whole else piece for piece in part)


class WorkerExtension:
    """What `collective_rpc` finds on each worker of an engine started with this as its `worker_extension_cls`."""

    def teacher_reset_prior(self) -> None:
        """Before a shard."""
        if (collector := _collector_of(self)) is not None:
            collector.reset_prior()

    def teacher_take_prior(self) -> list[Any] | None:
        """After a shard: [positions, float64 [V] as bytes]; None from a worker that keeps no statistics."""
        if (collector := _collector_of(self)) is None or not collector.collects:
            return None
        positions, total = collector.take_prior()
        return [positions, b"" if total is None else total.tobytes()]


def _collector_of(worker: Any) -> StatisticsCollector | None:
    """None on the early stages of a pipeline, which have no pooler of ours."""
    return getattr(getattr(worker.get_model(), "pooler", None), "collector", None)
