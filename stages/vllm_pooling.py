"""The route `pooling` of vLLM: what its engine and requests are asked for, and what its answers mean.

The work itself is done on vLLM's side, in `stages.vllm_plugin`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stages.corpus import Sequence as TokenSequence
from stages.statistics import StatisticsOptions
from stages.teacher import ScoredSequence, refuse_non_finite
from stages.vllm_plugin import (
    CONFIG_KEY,
    PackedStatistics,
    options_to_config,
    request_extras,
    statistics_architecture,
)
from storage.errors import RunError

if TYPE_CHECKING:
    from vllm import PoolingParams


def engine_args(options: StatisticsOptions, architecture: str) -> dict[str, Any]:
    """vLLM's `EngineArgs` for our pooler on `architecture`, a name of vLLM's registry."""
    from vllm.config import PoolerConfig

    return {
        "runner": "pooling",
        "worker_extension_cls": "stages.vllm_plugin.WorkerExtension",
        "pooler_config": PoolerConfig(task="token_embed", tok_pooling_type="ALL", seq_pooling_type="LAST"),
        # The original stays in the list: vLLM looks for some architectures by name.
        "hf_overrides": {
            "architectures": [statistics_architecture(architecture), architecture],
            "head_dtype": "float32",
        },
        "additional_config": {CONFIG_KEY: options_to_config(options)},
    }


def request_params(index: int, sequence: TokenSequence) -> PoolingParams:
    """`index`: unique among the sequences of one shard."""
    from vllm import PoolingParams

    return PoolingParams(task="token_embed", extra_kwargs=request_extras(index, sequence.loss_mask))


def trial_params() -> PoolingParams:
    """Return the parameters of a request that belongs to no shard."""
    from vllm import PoolingParams

    return PoolingParams(task="token_embed")


def scored_from_packed(sequence: TokenSequence, packed: PackedStatistics) -> ScoredSequence:
    """A pooler's answer with entries at the masked-in positions, or at all of them, which are then dropped."""
    rows, stored = len(sequence.input_ids) - 1, int(sequence.loss_mask.sum())
    entries = packed
    if len(packed.dense) != rows or len(packed.entries) not in (stored, rows):
        raise RunError(
            f"sequence {sequence.sequence_id}: the engine scored {len(packed.dense)} positions and stored "
            f"{len(packed.entries)}, expected {rows} and {stored}"
        )
    if len(packed.entries) != stored:
        entries = PackedStatistics(
            packed.options, packed.vocabulary_size, packed.dense, packed.entries[sequence.loss_mask]
        )
    if not entries.has_whole_ids:
        raise RunError(f"sequence {sequence.sequence_id}: the engine gave an id that is no whole number")
    gold, tail, entropy = np.ascontiguousarray(packed.dense[:, :3].T)
    refuse_non_finite(sequence, gold, entropy)
    return ScoredSequence(
        sequence,
        gold_logprob=gold,
        tail_logmass=tail,
        entropy=entropy,
        top_ids=entries.top_ids,
        top_logprobs=entries.top_logprobs,
        tail_logmass_at=packed.dense[:, 3:].copy(),
        tail_samples=entries.tail_samples,
        **entries.sketch,
    )
