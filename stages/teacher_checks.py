"""Models that cannot be a teacher, and ids that a teacher cannot read: known before a shard is written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from stages.corpus import Corpus
    from stages.engines import Choice, EngineOptions
    from stages.rows import Origin
    from stages.teacher import ScoredSequence, Teacher

# Tasks by which transformers names classes without a head that predicts the next token.
_OTHER_TASKS = re.compile(
    r"For(MaskedLM|PreTraining|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|"
    r"NextSentencePrediction|Seq2SeqLM|ImageClassification|RewardModel|TextEncoding)$"
)
# Decoders of transformers that have the switch `is_decoder` and do not obey it.
_ALWAYS_DECODERS = ("gpt_neox", "gpt_neox_japanese", "trocr")
# Ids of the two sequences by which a model is asked whether it looks ahead.
_ASKED = 16
# Largest difference in nats that rounding makes of the same prefix in two sequences of the same length.
_TOLERANCE = {"float32": 1e-3}
_TOLERANCE_HALF = 0.25
# Nats; a tail of less mass may be nothing but rounding.
_SMALLEST_TAIL = -7.0
# Nats that stand for a probability of 0, so that two of them do not differ.
_LOWEST = -1e4


def check_kind(config: PretrainedConfig, name: str) -> None:
    """Refuse a model whose configuration alone says that it does not predict the next token. Raises UserError."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name}: is an encoder-decoder model ({config.model_type}), which reads a whole input before it writes; "
            "a teacher must be a causal language model"
        )
    named = list(getattr(config, "architectures", None) or [])
    if named and all(_OTHER_TASKS.search(str(architecture)) for architecture in named):
        raise UserError(
            f"{name}: its configuration names {named[0]}, which does not predict the next token from the ones before; "
            "a teacher must be a causal language model"
        )
    if (switch := _reads_ahead(config)) is not None:
        raise UserError(
            f"{name}: its configuration ({config.model_type}) has {switch}, by which every token sees the tokens after "
            "it; a teacher must be a causal language model"
        )


def _reads_ahead(config: PretrainedConfig) -> str | None:
    """Return the field by which a configuration makes a model read in both directions; None where there is none."""
    kind, text = type(config), config.get_text_config()
    if any(getattr(each, "is_causal", True) is False for each in (config, text)):
        return "is_causal false"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "use_bidirectional_attention"
    # What the code that comes with a model does with the switches below, only its scores tell.
    if not kind.__module__.startswith("transformers.") or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return None
    if getattr(kind, "causal", None) is False and not config.causal:
        return "causal false"
    if getattr(kind, "attn_type", None) == "bi" and config.attn_type == "bi":
        return "attn_type bi"
    # The decoder of an encoder-decoder model, loaded alone, sets the switch itself.
    always = kind.is_encoder_decoder or config.model_type in _ALWAYS_DECODERS
    if getattr(kind, "is_decoder", None) is False and not config.is_decoder and not always:
        return "is_decoder false"
    return None


def stated_context(config: PretrainedConfig) -> int | None:
    """Return the `max_position_embeddings` of a model's text part; None where it states none, or 0 or -1 for no end."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if context is not None and context > 0 else None


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens the model reads at most; None where its configuration does not say."""
    context = stated_context(config)
    if context is None:
        return None
    # `dynamic` rope stretches beyond the context that a configuration states, by as much as its factor.
    factors = [rope.get("factor") or 1 for rope in rope_parameters(config) if rope.get("rope_type") == "dynamic"]
    return int(context * max([1, *factors]))


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the rope parameters of a configuration: one dictionary for all layers, or one for each type of layer."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "rope_type" in given:
        return [given]
    return [value for value in given.values() if isinstance(value, dict)]


def rope_of_vllm(config: PretrainedConfig, choice: Choice, options: EngineOptions, max_length: int) -> str | None:
    """Say how vLLM's scores differ from the model's own where rope depends on a sequence's length; else None.

    max_length: ids of the longest sequence. Raises UserError where vLLM has no such rope.
    """
    if choice.engine == "transformers":
        return None
    # What vLLM calls max_model_len; a completion has one id more.
    given = options.vllm_args.get("max_model_len"), getattr(choice.teacher, "served_length", None)
    own = max_length + choice.engine.endswith("prompt-logprobs")
    longest = max([own, *(int(str(length)) for length in given if str(length).isdigit())])
    context = stated_context(config)
    for rope in rope_parameters(config):
        kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
        if kind == "longrope" and original and longest > original:
            return (
                f"vLLM uses this teacher's long rope factors for every sequence, since it takes up to {longest} "
                f"tokens, more than {original}; the transformers engine chooses the factors for each sequence"
            )
        if kind == "dynamic" and context and max_length > context:
            raise UserError(
                f"--max-length {max_length}: vLLM does not stretch this teacher's dynamic rope beyond its {context} "
                f"tokens; choose --engine transformers, or --max-length {context} at most"
            )
    return None


def engine_length(config: PretrainedConfig, longest: int, max_length: int) -> int:
    """Return the ids of a sequence that an engine is started for.

    The longest there is, unless vLLM chooses rope factors by it: then the scores of a sequence must not depend on the
    rest of the corpus, and an audit must be able to ask for the same.
    """
    kinds = {rope.get("rope_type") for rope in rope_parameters(config)}
    return max_length if "longrope" in kinds else longest


def refuse_beyond_head(
    rows: Iterable[Any], indices: Iterable[int], *, head: int, longest: int | None, tokenizer: Any, origin: Origin
) -> None:
    """Refuse the first row with a token id that the teacher's head of this width does not have. Raises UserError.

    rows: what each row became: None, (ids, mask), or several of those. longest: ids of a row that are kept; None: all.
    """
    for row, index in zip(rows, indices, strict=True):
        for part in row if isinstance(row, list) else [row]:
            if part is None or not len(part[0]):
                continue
            ids = np.asarray(part[0])[:longest]
            if (largest := int(ids.max())) >= head:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise UserError(
                    f"The token {token!r} in {origin.where(index)} has id {largest}, and the teacher knows only ids "
                    f"below {head}: its tokenizer has tokens that the model was never given; remove them from the "
                    "text or from the tokenizer."
                )


def check_causal(teacher: Teacher, corpus: Corpus, name: str) -> None:
    """Refuse a teacher that says of a token what depends on anything but the tokens before it.

    Two sequences that begin with the same ids are scored, one of them again beside the longest of the corpus, and that
    one twice.
    Raises UserError, and RunError where the scores are no numbers.
    """
    from stages.corpus import Sequence
    from stages.teacher import refuse_non_finite

    longest = int(corpus.lengths.argmax())
    whole = corpus.read(longest, longest + 1)[0]
    length = min(_ASKED, len(whole.input_ids))
    shared = length // 2
    mask = np.ones(length - 1, bool)

    def score(*sequences: Sequence) -> ScoredSequence:
        scored = teacher.score(sequences, lambda tokens: None).sequences[0]
        refuse_non_finite(scored.sequence, scored.gold_logprob)
        return scored

    ours = score(Sequence(0, whole.input_ids[:length].copy(), mask))
    other = score(Sequence(0, _continued_otherwise(ours, shared, teacher.vocabulary_size), mask))
    tolerance = _TOLERANCE.get(teacher.description.dtype, _TOLERANCE_HALF)
    ahead = max(_difference_at(position, ours, other) for position in range(shared))
    if ahead > tolerance:
        raise UserError(
            f"{name}: reads ahead: other tokens later in a sequence change the log-probabilities before them by "
            f"{ahead:.2g} nats; a teacher must be a causal language model"
        )
    # Engines that batch by themselves keep sequences apart, and only rounding differs with the batch.
    if teacher.description.name != "transformers":
        return

    first, second = score(whole), score(whole)
    if (change := float(np.abs(first.gold_logprob - second.gold_logprob).max())) > tolerance:
        raise UserError(
            f"{name}: draws at random: the log-probabilities of one sequence change by {change:.2g} nats from one time "
            "to the next; a teacher must say the same each time"
        )
    if len(whole.input_ids) == length:
        return
    # The median, since rounding may send a token to another expert.
    change = float(np.median(np.abs(ours.gold_logprob - score(ours.sequence, whole).gold_logprob)))
    if change > tolerance:
        raise UserError(
            f"{name}: a sequence's log-probabilities change by {change:.2g} nats with the other sequences of its "
            "batch; lower --batch-tokens to 2, which scores each sequence alone"
        )


def _continued_otherwise(scored: ScoredSequence, shared: int, vocabulary_size: int) -> np.ndarray:
    """Return the ids of a sequence, int32 [L], with every id from number `shared` on replaced by another one.

    The teacher expects the new ids, so what it said of each without seeing it is among its entries.
    """
    ids = scored.sequence.input_ids.copy()
    for place in range(shared, len(ids)):
        others = [id for id in scored.top_ids[place - 1].tolist() if id not in (-1, ids[place])]
        ids[place] = others[0] if others else (ids[place] + 1) % vocabulary_size
    return ids


def _difference_at(position: int, one: ScoredSequence, other: ScoredSequence) -> float:
    """Return by how many nats, at least, two distributions differ in any id that one of them keeps.

    What is outside the top-N is compared as mass, where both keep the same ids: in nats, little of it is mostly
    rounding.
    """
    pair = (one, other)
    kept = [_entries_at(position, scored) for scored in pair]
    tails = [float(scored.tail_logmass[position]) for scored in pair]
    if any(np.isnan([*entries.values(), tail]).any() for entries, tail in zip(kept, tails, strict=True)):
        return float("inf")
    found = [abs(kept[0][id] - kept[1][id]) for id in kept[0].keys() & kept[1].keys()]
    tops = [{id for id in scored.top_ids[position].tolist() if id >= 0} for scored in pair]
    if tops[0] == tops[1]:
        # The gold is in no tail, and not always in the top-N.
        outside = [
            np.exp(tail) + sum(np.exp(entries[id]) for id in entries.keys() - top)
            for entries, tail, top in zip(kept, tails, tops, strict=True)
        ]
        found.append(abs(outside[0] - outside[1]))
    for entries, missed, top, tail in ((kept[0], kept[1], tops[1], tails[1]), (kept[1], kept[0], tops[0], tails[0])):
        # An id that the other left out has at most what its least entry has, and what its tail has.
        most = min([max(tail, _SMALLEST_TAIL), *(missed[id] for id in top)])
        found += [entries[id] - most for id in entries.keys() - missed.keys()]
    return float(max(found))


def _entries_at(position: int, scored: ScoredSequence) -> dict[int, float]:
    """Return the log-probabilities, in nats, that a sequence keeps of a position, by id: of the top-N and the gold."""
    ids = [int(scored.sequence.input_ids[position + 1]), *scored.top_ids[position].tolist()]
    logprobs = np.maximum([scored.gold_logprob[position], *scored.top_logprobs[position]], _LOWEST)
    return {id: logprob for id, logprob in zip(ids, logprobs.tolist(), strict=True) if id >= 0}


def check_quantization(config: PretrainedConfig, name: str) -> None:
    """Refuse a quantised checkpoint that transformers cannot read here, and name what it misses. Raises UserError."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    try:
        quantizer = AutoHfQuantizer.from_config(given, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # noqa: BLE001 - each method's own packages raise what they like
        reason = " ".join(str(error).split()).split(" - ")[0][:200] or type(error).__name__
        raise UserError(
            f"{name}: its weights are quantised ({getattr(method, 'value', method)}), which transformers cannot read "
            f"here ({reason}); install what is missing, or choose --engine vllm"
        ) from None
