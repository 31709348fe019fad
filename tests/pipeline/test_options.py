"""Choices that the commands repeat, because importing them would slow `--help`, equal what the stages know."""

from __future__ import annotations

from dataclasses import fields

import click

from pipeline.commands import cache_teacher, train_student
from stages import cache_options, corpus, engines, objective, ranking
from stages.student import StudentOptions
from stages.tail import TAIL_CHOICES


def choices(command: click.Command, name: str) -> tuple[str, ...]:
    (param,) = [param for param in command.params if param.name == name]
    assert isinstance(param.type, click.Choice)
    return tuple(param.type.choices)


def defaults(command: click.Command) -> dict[str, object]:
    return {param.name: param.default for param in command.params if param.name}


def test_choices() -> None:
    assert choices(train_student.command, "objective") == objective.OBJECTIVES
    assert choices(train_student.command, "normalize") == objective.NORMALIZATIONS
    assert choices(train_student.command, "rank_scope") == ranking.RANK_SCOPES
    assert choices(train_student.command, "tail") == TAIL_CHOICES
    assert choices(cache_teacher.command, "dtype") == cache_options.DTYPES
    assert choices(cache_teacher.command, "turns") == corpus.TURNS


def test_defaults() -> None:
    ours = defaults(train_student.command)
    for field in fields(objective.Objective):
        if field.name != "name":
            assert ours[field.name] == field.default, field.name
    assert ours["objective"] == objective.Objective().name
    for name in ("eval_share", "seed", "dtype"):
        assert ours[name] == getattr(StudentOptions("", "", ""), name)
    assert choices(cache_teacher.command, "engine") == engines.ENGINES
    engine = engines.EngineOptions("")
    options = cache_options.CacheOptions(engine, "", "")
    theirs = defaults(cache_teacher.command)
    for name in ("top_n", "dtype", "overlong", "turns", "shard_tokens", "seed", "append_eos", "tail_samples"):
        assert theirs[name] == getattr(options, name), name
    for name in ("engine", "batch_tokens", "vllm_route", "server_concurrency"):
        assert theirs[name] == getattr(engine, name), name
    assert int(str(theirs["logprob_bits"])) == options.logprob_bits
