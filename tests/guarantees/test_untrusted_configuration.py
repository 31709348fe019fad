"""A configuration of somebody else says what a command uses; it runs no code and sends nothing to a service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import UserError
from storage.limits import LIMITS, Limit
from tests.conftest import Tiny


@pytest.mark.parametrize("key", ["trust-remote-code", "trust_remote_code"])
@pytest.mark.parametrize("command", ["train-student", "cache-teacher", "generate", "audit", "plan"])
def test_a_configuration_runs_no_code(key: str, command: str, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    (tmp_path / "run.yaml").write_text(f"{key}: true\n")
    ended = pipeline(command, "--config", tmp_path / "run.yaml")
    assert ended.code == 2
    assert "runs Python code that comes with a model, so it is taken on the command line alone" in ended.err


ENGINE = {
    "scheduler_cls": "evilmod.X",
    "worker_cls": "evilmod.X",
    "logits_processors": ["evilmod:X"],
    "distributed_executor_backend": "evilmod.X",
    "kv_transfer_config": {"kv_connector": "X", "kv_connector_module_path": "evilmod"},
    "ec_transfer_config": {"ec_connector": "X", "ec_connector_module_path": "evilmod"},
    "compilation_config": {"backend": "evilmod.X"},
    "hf_overrides": {"auto_map": {"AutoConfig": "evil--repo.X"}},
    "quantization": {"x": "evilmod"},
    "otlp_traces_endpoint": "http://127.0.0.1:1",
    "reasoning_parser_plugin": "evil.py",
    "load-format": ["evilmod"],
}


@pytest.mark.parametrize("field", ENGINE)
@pytest.mark.parametrize("command", ["cache-teacher", "generate", "audit", "plan"])
def test_a_configuration_gives_the_engine_no_code(
    field: str, command: str, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    (tmp_path / "run.yaml").write_text(f"vllm-arg:\n  {field}: {json.dumps(ENGINE[field])}\n")
    ended = pipeline(command, "--config", tmp_path / "run.yaml")
    assert ended.code == 2 and "it may let vLLM run other code" in ended.err, ended.err
    assert "taken on the command line alone" in ended.err


def test_a_configuration_gives_the_engine_numbers(tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    pairs = "tensor_parallel_size: 8\n  quantization: fp8\n  hf_overrides: {head_dtype: model}\n"
    (tmp_path / "run.yaml").write_text(f"vllm-arg:\n  {pairs}")
    ended = pipeline("generate", "--config", tmp_path / "run.yaml")
    assert "Missing option" in ended.err, ended.err


@pytest.mark.parametrize(
    "line",
    [
        "report-to: wandb",
        "report_to: [tensorboard, comet_ml]",
        "trainer: {report_to: all}",
        "trainer: {report_to: [[x]]}",
        "trainer: {deepspeed: evil.json}",
        "trainer: {deepspeed: {wandb: {enabled: true}}}",
    ],
)
def test_a_configuration_reports_to_no_service(line: str, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    (tmp_path / "run.yaml").write_text(line + "\n")
    ended = pipeline("train-student", "--config", tmp_path / "run.yaml")
    assert ended.code == 2, ended.err
    assert "taken on the command line alone" in ended.err or "takes one value" in ended.err, ended.err


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {bf16: !!bool maybe}",
        'seed: !!int ""',
        'trainer: {x: !!float ""}',
        "trainer: {x: !!timestamp foo}",
        "trainer: !!set {a}",
        "seed: !x 3",
        'output: "o\\ud800"',
        'trainer: {"a\\udfff": 3}',
        "trainer: {[1]: 2}",
        "trainer: {max_grad_norm: 0x" + "f" * 500_000 + "}",
        "seed: " + "9" * 100_000,
        "trainer: {run_name: [1, {[2]: 3}]}",
        "trainer: {lr_scheduler_kwargs: {1: 2}}",
        "trainer: {lr_scheduler_kwargs: {foo: 2}}",
        "trainer: {optim_args: foo}",
        "trainer: {lr_scheduler_kwargs: [1]}",
        "trainer: {optim: [1]}",
        "trainer: {adam_beta1: x}",
        "trainer: {run_name: {1: 2}}",
        "trainer: {bf16: maybe}",
        "trainer: {max_grad_norm: null}",
        "trainer: {save_steps: [3]}",
        "trainer: {logging_steps: x}",
    ],
)
def test_an_odd_value_is_one_sentence(
    text: str, tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    given = f"student: {tiny.student}\nshards: {cache_path}\n"
    given += "" if text.startswith("output") else f"output: {tmp_path / 'o'}\n"
    (tmp_path / "run.yaml").write_text(f"{given}{text}\n")
    ended = pipeline("train-student", "--config", tmp_path / "run.yaml")
    assert ended.code == 2 and "internal" not in ended.err and len(ended.err) < 1500, ended.err[:2000]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("pair", ["a=[!!bool x]", "a={b: !!int ''}", "bf16=!!bool maybe", "a=[*b]"])
def test_an_odd_pair_is_one_sentence(pair: str, pipeline: Callable[..., Any]) -> None:
    ended = pipeline("train-student", "--student", "s", "--shards", "c", "--output", "o", "--trainer", pair)
    assert ended.code == 2 and "internal" not in ended.err, ended.err


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.variable)
@pytest.mark.parametrize("value", ["9" * 17, "9" * 18, "9" * 19, "9" * 5000, "0", "-1", "x"])
def test_a_limit_of_many_digits_is_a_number_or_refused(
    limit: Limit, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limit.variable, value)
    if limit.unit == "bytes" and value in ("9" * 17, "9" * 18):
        assert limit.value == int(value)
    else:
        with pytest.raises(UserError, match=f"wants a number of {limit.unit}"):
            limit.value  # noqa: B018


@pytest.mark.parametrize(
    "field",
    [
        "push_to_hub",
        "hub_token",
        "hub_model_id",
        "hub_strategy",
        "output_dir",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ],
)
def test_a_configuration_sends_nothing_away(
    field: str, tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    given = f"student: {tiny.student}\nshards: {cache_path}\noutput: {tmp_path / 'o'}\n"
    (tmp_path / "run.yaml").write_text(f"{given}trainer:\n  {field}: sk-0123456789abcdef\n")
    ended = pipeline("train-student", "--config", tmp_path / "run.yaml")
    assert ended.code == 2 and f"--trainer {field}: " in ended.err
    assert "sk-0123456789abcdef" not in ended.err and not (tmp_path / "o").exists()
