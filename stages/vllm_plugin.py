"""The vLLM general plugin: every decoder that vLLM serves, once more as a model that pools teacher statistics.

vLLM runs `register` in each of its processes (entry point group `vllm.general_plugins`). For an architecture `A` of
its registry there is then `TeacherStatisticsA`: a subclass of the registered class, made on first use, whose pooler
applies the model's own `compute_logits` to slices of rows and keeps `row_statistics` of them. A request gives back
one packed float32 tensor; a `[tokens, vocabulary]` tensor never exists.

What travels where:

- the statistics options in vLLM's `additional_config`, under the key `teacher_logit_cache`;
- the loss mask of a sequence in its request's `PoolingParams.extra_kwargs`, so that only masked-in positions send
  top-N entries; a request without one (the HTTP server's) gets them at every scored position;
- the summed tail distribution of a shard stays on the worker until `WorkerExtension` is asked for it;
- a sketch is made on the workers and given to them through `WorkerExtension`: hidden states never leave them.

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

from stages.parent_watch import end_engine_with_parent
from stages.sketch import HiddenMoments, Sketch
from stages.statistics import (
    RowStatistics,
    StatisticsOptions,
    residual_uniforms,
    row_statistics,
    rows_per_slice,
    sample_uniforms,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLUGIN_NAME = "teacher_logit_cache"
ARCHITECTURE_PREFIX = "TeacherStatistics"
# The key in `additional_config` and in `PoolingParams.extra_kwargs`.
CONFIG_KEY = "teacher_logit_cache"
# float32 holds integers exactly below this, and packed ids are float32.
MAX_VOCABULARY = 1 << 24

_MAGIC = 7105.0
_FORMAT = 3.0
_SEED_DIGITS = 3  # base 2**22, so each is exact in float32
_FIXED_HEADER = 12 + _SEED_DIGITS

# Bytes of fp32 logits that the head makes at a time, on an accelerator and on a CPU: more rows share one reading of
# its weights. The statistics go over them many times, on a CPU in blocks that its caches hold.
_HEAD_BYTES = (256 << 20, 128 << 20)
_CACHED_BYTES = 16 << 20


# What travels -------------------------------------------------------------------------------------------------------


def options_to_config(options: StatisticsOptions) -> dict[str, Any]:
    """The options as `additional_config[CONFIG_KEY]`, plain JSON."""
    config = {
        "top_n": options.top_n,
        "temperatures": list(options.temperatures),
        "tail_samples": options.tail_samples,
        "seed": options.seed,
        "tail_epsilon": options.tail_epsilon,
        "min_n": options.min_n,
    }
    if options.sketch_rank:
        config |= {"sketch_rank": options.sketch_rank, "residual_samples": options.residual_samples}
    return config


def options_from_config(config: Any) -> StatisticsOptions:
    """Raises ValueError where `additional_config` does not hold ours."""
    try:
        ours = config[CONFIG_KEY]
        return StatisticsOptions(
            top_n=int(ours["top_n"]),
            temperatures=tuple(float(t) for t in ours.get("temperatures", ())),
            tail_samples=int(ours.get("tail_samples", 0)),
            seed=int(ours.get("seed", 0)),
            sketch_rank=int(ours.get("sketch_rank", 0)),
            residual_samples=int(ours.get("residual_samples", 0)),
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
    `entries [P, 2N + M]` (top ids, top log-probabilities, tail samples), with a sketch `[P, 2N + M + r + m + 2]`
    (codes, residual samples, residual mass, sketch_kl as well). Ids and codes are integers in float32.
    """

    options: StatisticsOptions
    vocabulary_size: int
    dense: np.ndarray
    entries: np.ndarray

    @property
    def has_whole_ids(self) -> bool:
        """Whether all that are ids, of the top-N and of samples, are integers that int32 holds."""
        top_n, samples = self.options.top_n, self.options.tail_samples
        for values in (self.entries[:, :top_n], self.entries[:, 2 * top_n : 2 * top_n + samples]):
            # NaN compares with nothing.
            if not ((np.floor(values) == values) & (np.abs(values) < 2**31)).all():
                return False
        return True

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
        start = 2 * self.options.top_n
        return self.entries[:, start : start + self.options.tail_samples].astype(np.int32)

    @property
    def sketch(self) -> dict[str, np.ndarray]:
        """The fields of ScoredSequence that come with a sketch; empty without one."""
        options = self.options
        if not options.sketch_rank:
            return {}
        codes = 2 * options.top_n + options.tail_samples
        samples = codes + options.sketch_rank
        return {
            "sketch_codes": self.entries[:, codes:samples].astype(np.uint8),
            "residual_samples": self.entries[:, samples:-2].astype(np.int32),
            "residual_mass": self.entries[:, -2].copy(),
            "sketch_kl": self.entries[:, -1].copy(),
        }

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
        counts = [int(x) for x in packed[2:11]]
        vocabulary, rows, stored, top_n, temperatures, samples, min_n, rank, residuals = counts
        seed = sum(int(digit) << (22 * i) for i, digit in enumerate(packed[12:_FIXED_HEADER]))
        body = _FIXED_HEADER + temperatures
        options = StatisticsOptions(
            top_n,
            # These come back as the shortest decimal that float32 cannot tell from them.
            tuple(float(str(t)) for t in packed[_FIXED_HEADER:body]),
            tail_samples=samples,
            seed=seed,
            tail_epsilon=float(str(packed[11])),
            min_n=min_n,
            residual_samples=residuals,
            sketch_rank=rank,
        )
        width = _entry_width(options)
        dense_size, entries_size = rows * (3 + temperatures), stored * width
        if min(counts) < 0 or len(packed) != body + dense_size + entries_size:
            raise ValueError(f"packed statistics of {len(packed)} numbers, their header promises others")
        return cls(
            options,
            vocabulary,
            packed[body : body + dense_size].reshape(rows, 3 + temperatures),
            packed[body + dense_size :].reshape(stored, width),
        )


def _entry_width(options: StatisticsOptions) -> int:
    """Numbers of one stored position."""
    sketch = options.sketch_rank + options.residual_samples + 2 if options.sketch_rank else 0
    return 2 * options.top_n + options.tail_samples + sketch


def _header(options: StatisticsOptions, vocabulary: int, rows: int, stored: int) -> list[float]:
    digits = [(options.seed >> (22 * i)) & ((1 << 22) - 1) for i in range(_SEED_DIGITS)]
    kept = [options.top_n, len(options.temperatures), options.tail_samples, options.min_n]
    counts = [vocabulary, rows, stored, *kept, options.sketch_rank, options.residual_samples]
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

    Between `start_moments` and `take_sketch` the moments of the hidden states are all that is collected.
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
        self.sketch: Sketch | None = None
        self._moments: HiddenMoments | None = None
        self._calibrating = False
        self._like: torch.Tensor | None = None
        self._prior_sum: torch.Tensor | None = None
        self._prior_positions = 0
        self._prior_reached: dict[int, int] = {}

    def start_moments(self) -> None:
        """Collect nothing but moments of hidden states, on every rank."""
        self._prior_reached = {}
        self._moments, self._calibrating = None, True

    def take_sketch(self, rank: int, soft_cap: float | None) -> Sketch | None:
        """The sketch of the moments since `start_moments`; None on other ranks, which must call it too."""
        from stages.sketch_calibration import calibrate_head

        moments, like = self._moments, self._like
        self._moments, self._calibrating = None, False
        self._prior_reached = {}
        if moments is None or like is None:
            raise RuntimeError("no hidden states were collected")
        return calibrate_head(
            moments, self.compute_logits, self.vocabulary_size, rank, like, soft_cap=soft_cap, collects=self.collects
        )

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
        if self._calibrating:
            return self._collect_moments(hidden, chunks)
        gold = np.zeros(tokens, np.int64)
        entry = np.zeros(tokens, bool)
        in_prior = np.zeros(tokens, bool)
        uniforms = np.zeros((tokens, self.options.tail_samples))
        residuals = np.zeros((tokens, self.options.residual_samples))
        begin = 0
        for chunk in chunks:
            scored, stored = chunk.scored(), chunk.stored_mask()
            rows = slice(begin, begin + len(scored))
            gold[rows] = chunk.prompt_ids[scored.start + 1 : scored.stop + 1]
            entry[rows] = stored
            if self.options.tail_samples and stored.any():
                uniforms[rows] = sample_uniforms(chunk.prompt_ids, self.options)[scored.start : scored.stop]
            if self.options.residual_samples and stored.any():
                residuals[rows] = residual_uniforms(chunk.prompt_ids, self.options)[scored.start : scored.stop]
            in_prior[rows] = self._counted(chunk)
            begin += chunk.stop - chunk.start

        device = hidden.device
        gold_rows = torch.from_numpy(gold).to(device)
        prior_rows = torch.from_numpy(in_prior).to(device) if in_prior.any() else None
        uniform_rows = torch.from_numpy(uniforms).to(device) if self.options.tail_samples else None
        residual_rows = torch.from_numpy(residuals).to(device) if self.options.residual_samples else None
        if self.collects and self._lacks_sketch and any(chunk.key is not None for chunk in chunks):
            raise RuntimeError("positions are scored before the workers have the sketch")
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
            codes = self._codes(hidden[start:stop])
            statistics = self._statistics(
                _Rows(
                    logits,
                    gold_rows[start:stop],
                    None if uniform_rows is None else uniform_rows[start:stop],
                    None if prior_rows is None else prior_rows[start:stop],
                    codes,
                    None if residual_rows is None else residual_rows[start:stop],
                ),
                slice_prior,
            )
            del logits
            if slice_prior is not None:
                self._add_to_prior(slice_prior)
            first, last = np.searchsorted(entry_rows, (start, stop))
            dense.append(_dense(statistics))
            entries.append(_entries(statistics, codes, entry_index[first:last] - start))
        if not self.collects:
            return [None] * len(chunks)
        self._prior_positions += int(in_prior.sum())
        return _split(torch.cat(dense), torch.cat(entries), chunks)

    def _counted(self, chunk: Chunk) -> np.ndarray:
        """bool, one per scored position of the chunk: stored, and not seen before.

        A preempted request is scored again from its start.
        """
        scored, stored = chunk.scored(), chunk.stored_mask()
        if chunk.key is None:
            return np.zeros(len(scored), bool)
        reached = self._prior_reached.get(chunk.key, 0)
        self._prior_reached[chunk.key] = max(reached, scored.stop)
        return stored & (np.arange(scored.start, scored.stop) >= reached)

    def _collect_moments(
        self, hidden: torch.Tensor, chunks: Sequence[Chunk]
    ) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Pieces of no numbers, so that requests end as always."""
        counted = np.zeros(len(hidden), bool)
        begin = 0
        for chunk in chunks:
            counted[begin : begin + len(chunk.scored())] = self._counted(chunk)
            begin += chunk.stop - chunk.start
        if self._moments is None:
            self._moments, self._like = HiddenMoments(hidden.shape[1], hidden.device), hidden.new_empty(0)
        self._moments.add(hidden[torch.from_numpy(counted).to(hidden.device)])
        if not self.collects:
            return [None] * len(chunks)
        return [
            (hidden.new_zeros((len(c.scored()), 0)), hidden.new_zeros((int(c.stored_mask().sum()), 0))) for c in chunks
        ]

    @property
    def _lacks_sketch(self) -> bool:
        return self.options.sketch_rank > 0 and self.sketch is None

    def _codes(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """uint8 `[C, r]`. Before there is a sketch, when vLLM measures memory, they are 0."""
        if not self.options.sketch_rank:
            return None
        if self.sketch is None:
            return torch.zeros((len(hidden), self.options.sketch_rank), dtype=torch.uint8, device=hidden.device)
        return self.sketch.encode(hidden)

    def _add_to_prior(self, tail_sum: torch.Tensor) -> None:
        if self._prior_sum is None:
            self._prior_sum = tail_sum.double()
        else:
            self._prior_sum += tail_sum

    def _statistics(self, given: _Rows, prior_sum: torch.Tensor | None) -> RowStatistics:
        """`row_statistics`, in blocks that a CPU's caches hold, and in halves where the whole does not fit."""
        rows = len(given.logits)
        block = rows_per_slice(self.vocabulary_size, _CACHED_BYTES) if given.logits.device.type == "cpu" else rows
        if rows <= block:
            try:
                sketch_logits = None
                if given.codes is not None:
                    sketch_logits = (
                        torch.zeros_like(given.logits, dtype=torch.float32)
                        if self.sketch is None
                        else self.sketch.logits(given.codes)
                    )
                return row_statistics(
                    given.logits,
                    given.gold,
                    self.options,
                    uniforms=given.uniforms,
                    prior_sum=prior_sum,
                    prior_rows=given.prior_rows,
                    sketch_logits=sketch_logits,
                    residual_uniforms=given.residual_uniforms,
                )
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            torch.cuda.empty_cache()
            block = rows // 2
        parts = [self._statistics(given[start : start + block], prior_sum) for start in range(0, rows, block)]
        return RowStatistics(**{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])})


@dataclass
class _Rows:
    """What `row_statistics` is given for the rows of a slice, the codes in the place of their logits."""

    logits: torch.Tensor
    gold: torch.Tensor
    uniforms: torch.Tensor | None
    prior_rows: torch.Tensor | None
    codes: torch.Tensor | None
    residual_uniforms: torch.Tensor | None

    def __getitem__(self, rows: slice) -> _Rows:
        part: dict[str, Any] = {name: None if v is None else v[rows] for name, v in vars(self).items()}
        return _Rows(**part)


def _dense(s: RowStatistics) -> torch.Tensor:
    return torch.cat([torch.stack([s.gold_logprob, s.tail_logmass, s.entropy], 1), s.tail_logmass_at], 1)


def _entries(s: RowStatistics, codes: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    parts = [s.top_ids[rows].float(), s.top_logprobs[rows], s.tail_samples[rows].float()]
    if codes is not None:
        parts += [codes[rows].float(), s.residual_samples[rows].float()]
        parts += [s.residual_mass[rows, None], s.sketch_kl[rows, None]]
    return torch.cat(parts, 1)


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
    """The entry point. Cheap: models are named here and made on first use. May run more than once.

    In a process of an engine it also sees to it that the process ends when the one that started it is gone.
    """
    end_engine_with_parent()
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

    @torch.no_grad()
    def teacher_start_moments(self) -> None:
        """From now on only the moments of hidden states are collected."""
        if (collector := _collector_of(self)) is not None:
            collector.start_moments()

    @torch.no_grad()
    def teacher_take_sketch(self, rank: int, soft_cap: float | None) -> bytes | None:
        """`sketch.safetensors` of what was collected; None from a worker that keeps no statistics."""
        from stages.sketch_calibration import to_file

        if (collector := _collector_of(self)) is None:
            return None
        sketch = collector.take_sketch(rank, soft_cap)
        return None if sketch is None else to_file(sketch, {}).to_bytes()

    @torch.no_grad()
    def teacher_use_sketch(self, data: bytes) -> None:
        """The sketch by which everything is coded that is scored from now on."""
        from stages.sketch_calibration import from_file
        from storage.sketch_file import SketchFile

        if (collector := _collector_of(self)) is not None and collector.collects:
            options, width = collector.options, collector.vocabulary_size
            file = SketchFile.from_bytes(data, "the sketch", rank=options.sketch_rank, vocabulary_size=width)
            parameter = next(self.get_model().parameters())  # type: ignore[attr-defined]
            collector.sketch = from_file(file).to(parameter.device)


def _collector_of(worker: Any) -> StatisticsCollector | None:
    """None on the early stages of a pipeline, which have no pooler of ours."""
    return getattr(getattr(worker.get_model(), "pooler", None), "collector", None)
