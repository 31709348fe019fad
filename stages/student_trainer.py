"""The trainer of a prepared run: its student loaded, its datasets open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.cached_tail import extra_columns, measured_columns, sketch_numbers
from stages.trainer_arguments import COMPILE
from storage.cache import Cache
from storage.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from stages.student import Prepared, StudentOptions
    from stages.training import DistillationTrainer


def load_student(prepared: Prepared) -> PreTrainedModel:
    """The student, with weights read or drawn from the seed, and its adapters where it has some."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from stages.pretrained import load_causal_lm, load_config

    options = prepared.options
    dtype = getattr(torch, options.dtype)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    set_seed(options.seed)
    if options.init_from_config:
        config = load_config(options.student, **source)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    else:
        model = load_causal_lm(options.student, dtype=dtype, **source)
    return model if options.lora_rank is None else _with_lora(model, options, options.lora_rank)


def _with_lora(model: PreTrainedModel, options: StudentOptions, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    # peft says int and takes any number: adapters are scaled by alpha / rank.
    alpha: Any = 2 * rank if options.lora_alpha is None else options.lora_alpha
    target: Any = "all-linear" if options.lora_target == ("all-linear",) else list(options.lora_target)
    try:
        return get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=target),
        )
    except ValueError as error:
        raise UserError(f"--lora-target: {' '.join(str(error).split())[:300]}") from None


def make_trainer(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> DistillationTrainer:
    """The trainer of a prepared run, its student loaded and its datasets open."""
    from transformers import PrinterCallback

    from stages.causal_lm import vocabulary_size
    from stages.distillation_forward import compile_body
    from stages.mixing import Mixture
    from stages.shard_dataset import Collator, ShardDataset, corpus_threshold
    from stages.training import DistillationTrainer
    from stages.wider_teacher import shares_within

    options, parts = prepared.options, prepared.parts

    def opened(cache: Cache, ids: np.ndarray, extra: Sequence[str], source: int) -> ShardDataset:
        return ShardDataset(cache, ids, extra=extra, source=source, checksums=options.checksums)

    model = load_student(prepared)
    vocabulary = vocabulary_size(model)
    objective = options.objective
    threshold = None
    if objective.rank_scope == "corpus":
        threshold = corpus_threshold([(part.cache, part.train_ids) for part in parts], objective.hard_ratio)
    sketches = sketch_numbers([part.cache for part in parts])
    packed = prepared.plan.batching == "packed"
    within = shares_within([part.cache for part in parts], vocabulary, objective.temperature)
    eval_dataset: Mixture | None = None
    eval_collator = None
    if prepared.held_out:
        extra = measured_columns([part.cache for part in parts])
        eval_dataset = Mixture([opened(part.cache, part.eval_ids, extra, i) for i, part in enumerate(parts)])
        # Easy and hard are split over the whole held-out share, so that no batch size changes a metric.
        eval_collator = Collator(
            replace(objective, rank_scope="corpus"),
            vocabulary,
            corpus_threshold([(part.cache, part.eval_ids) for part in parts], objective.hard_ratio),
            sketches=sketches,
            shares_within=shares_within([part.cache for part in parts], vocabulary, 1.0),
        )
    trained = [
        opened(part.cache, part.train_ids, extra_columns(objective, part.cache), i) for i, part in enumerate(parts)
    ]
    trainer = DistillationTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=Mixture(trained, options.mix or None),
        eval_dataset=eval_dataset,
        data_collator=Collator(objective, vocabulary, threshold, packed, sketches, within),
        eval_collator=eval_collator,
        eval_sketch=prepared.eval_sketch,
        objective=objective,
        tail=prepared.tail,
        plan=prepared.plan,
        lengths=prepared.lengths,
        cache_names=cache_names([part.cache for part in parts]),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if any(options.trainer.get(name) for name in COMPILE):
        backend, mode = options.trainer.get("torch_compile_backend"), options.trainer.get("torch_compile_mode")
        compile_body(trainer.model, backend or "inductor", mode)
    return trainer


def cache_names(caches: Sequence[Cache]) -> list[str]:
    """The caches' directories by their last names, numbered where two have the same."""
    names = [cache.path.resolve().name for cache in caches]
    return [name if names.count(name) == 1 else f"{name}-{place + 1}" for place, name in enumerate(names)]
