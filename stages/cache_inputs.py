"""The teacher and the corpus of a cache, as far as they are known before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from stages.cache_options import CacheOptions
from stages.chat_settings import time_there
from stages.corpus import Corpus, CorpusOptions, build_corpus
from stages.identity import teacher_identity
from stages.pretrained import load_config, load_end_ids, load_tokenizer
from stages.sketch_identity import wanted_sketch
from stages.teacher_checks import check_kind, context_length, stated_context
from storage.errors import UserError
from storage.manifest import SketchIdentity, TeacherIdentity
from storage.places import place

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class TeacherFiles:
    """Holds all that is known of a teacher before its weights are read. vocabulary_size: V; max_length: in tokens.

    end_ids: the token ids that stop it. template_time: the time that its chat template is told, that of the cache where
    it was begun before. sketch: what is wanted, its checksum missing until it is known; sketch_bytes: where another
    cache has it.
    """

    config: PretrainedConfig
    identity: TeacherIdentity
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    max_length: int
    end_ids: tuple[int, ...]
    template_time: datetime | None
    sketch: SketchIdentity | None
    sketch_bytes: bytes | None


def read_teacher(options: CacheOptions) -> TeacherFiles:
    """Raises UserError where the teacher is not there, or cannot give what the options ask for."""
    source: dict[str, Any] = {
        "revision": options.engine.revision,
        "trust_remote_code": options.engine.trust_remote_code,
    }
    config = load_config(options.engine.teacher, **source)
    check_kind(config, options.engine.teacher)
    vocabulary = int(config.get_text_config().vocab_size)
    identity = teacher_identity(options.engine.teacher, config)
    sketch, sketch_bytes = wanted_sketch(
        config,
        identity,
        rank=options.sketch_rank,
        residual_samples=options.residual_samples,
        positions=options.sketch_positions,
        another=options.sketch_from,
    )
    options = replace(options, sketch_rank=sketch.rank if sketch else None)
    statistics = options.statistics()
    if statistics.top_n > vocabulary:
        raise UserError(f"--top-n {statistics.top_n}: the teacher's vocabulary has only {vocabulary} tokens")
    if statistics.min_n > statistics.top_n:
        raise UserError(f"--min-n {statistics.min_n}: is above --top-n {statistics.top_n}")
    if statistics.min_n > 1 and not statistics.tail_epsilon:
        raise UserError(f"--min-n {statistics.min_n}: belongs to --tail-epsilon, which is not given")
    max_length = max_length_of(options, config)
    tokenizer = load_tokenizer(options.engine.teacher, **source)
    options.chat.prepare(tokenizer)
    end_ids = load_end_ids(options.engine.teacher, config, **source)
    # Once: the corpus and the manifest must have the same moment, also where midnight passes in between.
    moment = options.chat.moment(tokenizer, time_there(place(options.output)) if options.output else None)
    return TeacherFiles(config, identity, tokenizer, vocabulary, max_length, end_ids, moment, sketch, sketch_bytes)


def read_corpus(options: CacheOptions, teacher: TeacherFiles) -> Corpus:
    """The tokenised corpus. Raises UserError for bad rows, RunError for a full disk."""
    return build_corpus(
        options.dataset,
        teacher.tokenizer,
        CorpusOptions(
            max_length=teacher.max_length,
            overlong=options.overlong,  # type: ignore[arg-type]
            turns=options.turns,  # type: ignore[arg-type]
            append_eos=options.append_eos,
            split=options.split,
            limit=options.limit,
            processes=options.processes,
            end_ids=teacher.end_ids,
            template_arguments=options.chat.values(),
            template_time=teacher.template_time,
            head=teacher.vocabulary_size,
            **options.columns,
        ),
    )


def resolve_dtype(dtype: str, config: PretrainedConfig) -> str:
    """`auto` is float32 on a CPU and the checkpoint's own precision on an accelerator; it stands in the manifest."""
    import torch

    from stages.teacher_transformers import default_device

    if dtype != "auto":
        return dtype
    if default_device().type == "cpu":
        return "float32"
    own = getattr(config, "dtype", None) or torch.bfloat16
    return str(own).removeprefix("torch.")


def max_length_of(options: CacheOptions, config: PretrainedConfig) -> int:
    context = context_length(config)
    if options.max_length is None:
        stated = stated_context(config)
        return min(DEFAULT_MAX_LENGTH, stated) if stated else DEFAULT_MAX_LENGTH
    if context and options.max_length > context:
        raise UserError(f"--max-length {options.max_length}: the teacher reads at most {context} tokens")
    return options.max_length
