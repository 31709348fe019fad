"""The route `prompt-logprobs`: vLLM's stock API, in this process or behind HTTP.

It gives the gold and the top-N log-probabilities and nothing of the rest of the distribution: `entropy` is NaN, there
is no tail prior, and `tail_logmass` is `log(1 - sum of the kept)`, which float32 log-probabilities only carry down to
about 1e-6: a smaller one is reported as 1e-6, or as what V - K ids at the N-th probability could hold where that is
less. Adaptive N works on this tail, so its threshold has to stand well above that resolution.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.corpus import Sequence as TokenSequence
from stages.statistics import StatisticsOptions, beyond_prefix
from stages.teacher import ScoredSequence, refuse_non_finite
from stages.teacher_checks import stated_context
from storage.errors import RunError, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import SamplingParams

# A tail below this is rounding: the log-probabilities behind it are float32.
TAIL_RESOLUTION = 1e-6
SMALLEST_EPSILON = 1e-5
# What vLLM writes into JSON for a log-probability of -inf, and what is kept of it.
_JSON_MINUS_INFINITY = -9999.0
_LOWEST = -1e4


def refuse_beyond_logprobs(options: StatisticsOptions, route: str) -> None:
    """UserError naming each statistic that prompt log-probabilities cannot give."""
    asked = []
    if options.temperatures:
        asked.append("--temperature (the tail at another temperature)")
    if options.tail_samples:
        asked.append("--tail-samples")
    if asked:
        raise UserError(f"{route} cannot give {' and '.join(asked)}: it shows only the top-N and the gold token")
    if 0 < options.tail_epsilon < SMALLEST_EPSILON:
        raise UserError(
            f"{route} cannot give --tail-epsilon {options.tail_epsilon:g}: its tails are the rest to 1, known to "
            f"{TAIL_RESOLUTION:g}; take {SMALLEST_EPSILON:g} or more"
        )


def engine_args(options: StatisticsOptions, config: PretrainedConfig, max_length: int) -> dict[str, Any]:
    """vLLM's `EngineArgs` for sequences of up to `max_length` ids; UserError where the model reads fewer."""
    limit = stated_context(config)
    if limit is not None and max_length > limit:
        raise UserError(f"the longest sequence has {max_length} ids, the model reads at most {limit}")
    return {
        "runner": "generate",
        # A generating engine insists on one id more than the prompt, which it then never reads.
        "max_model_len": max_length + 1,
        "max_logprobs": options.top_n,
        "hf_overrides": {"head_dtype": "float32"},
    }


def request_params(options: StatisticsOptions) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        prompt_logprobs=options.top_n,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scored_from_flat(
    sequence: TokenSequence, flat: Any, options: StatisticsOptions, vocabulary_size: int
) -> ScoredSequence:
    """vLLM's flat lists: nothing for the first id, then N+1 entries per id, itself first."""
    shape = (len(sequence.input_ids) - 1, options.top_n + 1)
    try:
        ids = np.array(flat.token_ids, np.int32).reshape(shape)
        logprobs = np.array(flat.logprobs, np.float32).reshape(shape)
    except ValueError:
        raise RunError(
            f"vLLM answered {len(flat.token_ids)} log-probabilities, expected {shape[0]} x {shape[1]}"
        ) from None
    return scored_from_logprobs(sequence, ids[:, 1:], logprobs[:, 1:], logprobs[:, 0], options, vocabulary_size)


def scored_from_json(
    sequence: TokenSequence, body: bytes, options: StatisticsOptions, vocabulary_size: int
) -> ScoredSequence:
    """A completion's answer: nothing for the first id, then a dictionary of N or N+1 ids each, the gold among them.

    Raises ValueError that says what is wrong with it.
    """
    golds = sequence.input_ids[1:].tolist()
    try:
        # NaN and Infinity are no JSON, and no log-probabilities.
        positions = json.loads(body, parse_constant=lambda name: name)["choices"][0]["prompt_logprobs"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        positions = None
    if not isinstance(positions, list):
        raise ValueError("an answer without the prompt_logprobs that vLLM sends")
    if len(positions) != len(golds) + 1:
        raise ValueError(f"log-probabilities of {max(len(positions) - 1, 0)} positions, asked for {len(golds)}")
    ids = np.empty((len(golds), options.top_n), np.int32)
    top = np.empty((len(golds), options.top_n), np.float32)
    gold = np.empty(len(golds), np.float32)
    for row, (token, position) in enumerate(zip(golds, positions[1:], strict=True)):
        try:
            said, tokens, logprobs = _of_position(position, token, options.top_n, vocabulary_size)
            # Beyond float32 is infinite, which is refused further on.
            with np.errstate(over="ignore"):
                gold[row], ids[row], top[row] = said, tokens, logprobs
        except _Unlike as error:
            raise ValueError(f"position {row}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise ValueError(f"position {row}: not the log-probabilities that vLLM sends") from None
    order = np.argsort(-top, axis=1, kind="stable")
    ids, top = np.take_along_axis(ids, order, 1), np.take_along_axis(top, order, 1)
    for values in (top, gold):
        values[values <= _JSON_MINUS_INFINITY] = _LOWEST
    return scored_from_logprobs(sequence, ids, top, gold, options, vocabulary_size)


class _Unlike(ValueError):
    """Return the problem of a position."""


def _of_position(
    position: dict[str, dict[str, Any]], gold: int, top_n: int, vocabulary_size: int
) -> tuple[float, list[int], list[float]]:
    """The gold's log-probability, the ids of the top-N and theirs.

    Raises _Unlike where something can be said of it, or whatever Python raises for what is no such position.
    """
    entries = [(entry["rank"], entry["logprob"], int(token)) for token, entry in position.items()]
    if len(entries) < top_n:
        raise _Unlike(f"{len(entries)} log-probabilities, asked for {top_n}")
    ranks, logprobs, tokens = zip(*entries, strict=True)
    # Not isinstance: True and False are ints to Python.
    if set(map(type, ranks)) != {int} or not set(map(type, logprobs)) <= {int, float}:
        raise _Unlike("a log-probability or a rank that is no number")
    if min(tokens) < 0 or max(tokens) >= vocabulary_size:
        raise _Unlike(f"id {max(tokens)}, the vocabulary has {vocabulary_size}")
    if str(gold) not in position:
        raise _Unlike(f"no log-probability of id {gold}, which follows there")
    # The gold token is there whatever its rank; the rank tells whether it is among the N.
    kept = sorted(entries, key=lambda entry: (entry[0], -entry[1], entry[2]))[:top_n]
    return position[str(gold)]["logprob"], [token for _, _, token in kept], [logprob for _, logprob, _ in kept]


def scored_from_logprobs(
    sequence: TokenSequence,
    top_ids: np.ndarray,
    top: np.ndarray,
    gold: np.ndarray,
    options: StatisticsOptions,
    vocabulary_size: int,
) -> ScoredSequence:
    """What prompt log-probabilities give: ids and log-probabilities `[L-1, N]`, descending, and gold `[L-1]`.

    `tail_logmass` is bounded as the module says; -inf only where the kept set is the vocabulary. Nothing is judged
    here but that the numbers are finite: raw logits come out as a kept set and a tail that do not sum to 1.
    """
    refuse_non_finite(sequence, gold)
    with np.errstate(over="ignore", divide="ignore"):
        return _with_tail(sequence, top_ids, top, gold, options, vocabulary_size)


def _with_tail(
    sequence: TokenSequence,
    top_ids: np.ndarray,
    top: np.ndarray,
    gold: np.ndarray,
    options: StatisticsOptions,
    vocabulary_size: int,
) -> ScoredSequence:
    golds = sequence.input_ids[1:]
    is_gold = top_ids == golds[:, None]
    outside = ~is_gold.any(1)
    kept = np.exp(top.astype(np.float64)).sum(1) + np.where(outside, np.exp(gold.astype(np.float64)), 0.0)
    tail_ids = np.maximum(vocabulary_size - top_ids.shape[1] - outside, 0)
    most = tail_ids * np.exp(top[:, -1].astype(np.float64))
    tail = np.minimum(np.maximum(1.0 - kept, TAIL_RESOLUTION), most)
    if options.tail_epsilon:
        others = np.where(is_gold, 0.0, np.exp(top.astype(np.float64)))
        beyond = beyond_prefix(torch.from_numpy(others), torch.from_numpy(tail), options.tail_epsilon, options.min_n)
        dropped = beyond.numpy()
        tail = tail + np.where(dropped, others, 0.0).sum(1)
        top_ids, top = np.where(dropped, -1, top_ids), np.where(dropped, -np.inf, top)
    tail_logmass = np.log(tail).astype(np.float32)
    mask = sequence.loss_mask
    return ScoredSequence(
        sequence,
        gold_logprob=np.ascontiguousarray(gold, np.float32),
        tail_logmass=tail_logmass,
        entropy=np.full(len(gold), np.nan, np.float32),
        top_ids=np.ascontiguousarray(top_ids[mask], np.int32),
        top_logprobs=np.ascontiguousarray(top[mask], np.float32),
        tail_logmass_at=np.zeros((len(gold), 0), np.float32),
        tail_samples=np.zeros((int(mask.sum()), 0), np.int32),
    )
