"""The training run as a whole: scaling over micro-batches, the held-out measures, what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.objective import Objective
from stages.shard_dataset import as_tensors
from stages.student import StudentOptions, prepare, train
from stages.student_trainer import make_trainer
from tests import reference
from tests.conftest import Tiny


def options(tiny: Tiny, cache: Path, output: Path, **more: Any) -> StudentOptions:
    trainer = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **more.pop("trainer", {})}
    return StudentOptions(str(tiny.student), str(cache), str(output), trainer=trainer, **more)


def weights(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize(
    "objective", [Objective("kl", normalize="token"), Objective("atkd", rank_scope="corpus", normalize="token")]
)
def test_accumulated_micro_batches_equal_one_large_batch(
    objective: Objective, tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    """Sequences of different lengths, so that a mean of means would differ; this is where losses are divided twice."""
    large = options(tiny, cache_path, tmp_path / "large", objective=objective)
    small = options(
        tiny,
        cache_path,
        tmp_path / "small",
        objective=objective,
        trainer={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    )
    losses = [train(prepare(given))["train_loss"] for given in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, other = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_group_losses_are_averaged_over_micro_batches(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """What Trainer reports for a step is the mean of its micro-batches' own losses."""
    given = options(
        tiny,
        cache_path,
        tmp_path / "out",
        trainer={
            "max_steps": 1,
            "gradient_accumulation_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
        },
    )
    trainer = make_trainer(prepare(given))
    batches = [as_tensors(batch) for batch, _ in zip(trainer.get_train_dataloader(), range(3), strict=False)]
    trainer.model.eval()
    with torch.no_grad():
        expected = np.mean([trainer.compute_loss(trainer.model, batch).item() for batch in batches])
    report = train(prepare(given))
    assert report["log"][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_held_out_measures_equal_the_definitions(tiny: Tiny, make_cache: Callable[..., Any], tmp_path: Path) -> None:
    """From the finished student's and the teacher's full logits, each held-out sequence alone, in float64."""
    from transformers import AutoModelForCausalLM

    cache = make_cache(tmp_path / "cache", top_n=509, logprob_bits=32)
    prepared = prepare(options(tiny, cache.path, tmp_path / "out", eval_share=0.1))
    report = train(prepared)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["eval_kl"] == report["eval_kl"]
    teacher = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kl, ce, agree, unc = [], [], [], []
    rows = {shard.first: cache.read_shard(i) for i, shard in enumerate(cache.manifest.shards)}
    for first, stored in rows.items():
        for sequence in set(prepared.parts[0].eval_ids.tolist()) & set(range(first, first + len(stored))):
            ids = stored["input_ids"][sequence - first].astype(np.int64)
            with torch.no_grad():
                p = teacher(torch.tensor(ids)[None]).logits[0, :-1].double().numpy()
                q = student(torch.tensor(ids)[None]).logits[0, :-1].double().numpy()
            kl += [reference.kl(a, b) for a, b in zip(p, q, strict=True)]
            ce += (-reference.log_softmax(q)[np.arange(len(q)), ids[1:]]).tolist()
            agree += (p.argmax(1) == q.argmax(1)).tolist()
            unc += [reference.unc(a, int(g)) for a, g in zip(p, ids[1:], strict=True)]
    hard = reference.is_hard(np.array(unc), 0.5)
    assert report["eval_tokens"] == len(kl)
    for name, values in [("kl", kl), ("cross_entropy", ce), ("agreement", agree)]:
        values = np.array(values, float)
        assert report[f"eval_{name}"] == pytest.approx(values.mean(), abs=1e-4)
        assert report[f"eval_{name}_hard"] == pytest.approx(values[hard].mean(), abs=2e-3)
        assert report[f"eval_{name}_easy"] == pytest.approx(values[~hard].mean(), abs=2e-3)


def test_a_compiled_body_trains_the_same_and_is_compiled_once_for_all_lengths(
    tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    """Batches of several lengths: a way that compiles for each step, or for each length, makes more graphs."""
    from torch._dynamo.utils import counters
    from transformers import TrainerCallback

    graphs: list[int] = []

    class CountGraphs(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    def report(name: str, **trainer: Any) -> dict[str, Any]:
        given = options(tiny, cache_path, tmp_path / name, trainer={"max_steps": 4, **trainer}, eval_share=0.0)
        return train(prepare(given), [CountGraphs()])

    plain = report("plain")
    compiled = report("compiled", torch_compile_backend="eager")
    assert graphs[:4] == [graphs[0]] * 4
    assert graphs[4:] == [graphs[0] + 1] * 4
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)


def test_the_result_loads_with_its_tokenizer(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(prepare(options(tiny, cache_path, tmp_path / "out")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.decode(model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=4)[0])
    assert text.startswith("import os")


def test_training_moves_the_student_towards_the_teacher(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    given = options(
        tiny, cache_path, tmp_path / "out", objective=Objective("kl"), trainer={"max_steps": 40, "eval_steps": 20}
    )
    report = train(prepare(given))
    trajectory = [entry["eval_kl"] for entry in report["log"] if "eval_kl" in entry]
    assert len(trajectory) == 2
    assert trajectory[-1] < trajectory[0]
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert losses[-1] < losses[0]


def test_from_a_configuration_alone(tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    """Random weights from the seed: the same seed gives the same start, another one another."""
    base = ["train-student", "--shards", cache_path, "--init-from-config", "--max-steps", 1, "--learning-rate", 0]
    config = tiny.student / "config.json"
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        done = pipeline(*base, "--student", config, "--seed", seed, "--output", tmp_path / name)
        assert done.code == 0, done.err
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_the_same_command_again_is_done_and_another_is_refused(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    base = ["train-student", "--student", tiny.student, "--shards", cache_path, "--output", tmp_path / "out"]
    first = pipeline(*base, "--max-steps", 2)
    again = pipeline(*base, "--max-steps", 2)
    other = pipeline(*base, "--max-steps", 3)
    assert (first.code, again.code, other.code) == (0, 0, 2)
    assert "finished already" in again.err
    assert first.out == again.out
    assert "holds another run (trainer max_steps: 2 there, 3 here)" in other.err


def test_trainer_arguments_reach_trainer_from_line_and_file(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"student: {tiny.student}\nshards: {cache_path}\nmax-steps: 2\nobjective: kl\n"
        "trainer:\n  optim: adafactor\n  learning_rate: 3e-4\n"
    )
    out = tmp_path / "out"
    done = pipeline("train-student", "--config", tmp_path / "run.yaml", "--output", out, "--trainer", "adam_beta2=0.9")
    assert done.code == 0, done.err
    saved = json.loads((out / "run.json").read_text())
    assert saved["trainer"] == {"optim": "adafactor", "learning_rate": 3e-4, "adam_beta2": 0.9, "max_steps": 2}
    assert saved["objective"]["name"] == "kl"
    prepared = prepare(
        StudentOptions(str(tiny.student), str(cache_path), str(tmp_path / "x"), trainer=saved["trainer"])
    )
    assert prepared.arguments.optim.value == "adafactor"


@pytest.mark.parametrize(
    "objective",
    [
        Objective("kl", tail="prior"),
        Objective("kl", tail="sampled"),
        Objective("kl", temperature=2.0, ce_weight=0.1),
        Objective("atkd", direction="reverse"),
        Objective("jsd", beta=0.9),
        Objective("tvd", train_on="hard"),
    ],
    ids=lambda objective: f"{objective.name}-{objective.tail}-{objective.direction}-T{objective.temperature:g}",
)
def test_every_kind_of_objective_trains(objective: Objective, tiny: Tiny, rich_cache: Path, tmp_path: Path) -> None:
    given = options(tiny, rich_cache, tmp_path / "out", objective=objective, trainer={"max_steps": 30})
    report = train(prepare(given))
    assert report["objective"]["tail"] == objective.for_cache(has_samples=True, has_prior=True).tail != "auto"
    losses = [entry for entry in report["log"] if "loss" in entry]
    assert losses[-1]["loss"] < losses[0]["loss"]
    # The decomposition is logged beside each loss.
    assert {"tkd_easy", "tkd_hard", "dkd_easy", "dkd_hard", "unc_easy", "unc_hard"} <= set(losses[0])
    assert losses[0]["unc_hard"] > losses[0]["unc_easy"]


@pytest.fixture(scope="module")
def rich_cache(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tail at temperature 2 and tail samples."""
    return make_cache(tmp_path_factory.mktemp("rich") / "cache", temperatures=(2.0,), tail_samples=4).path


def test_a_temperature_or_samples_that_the_cache_lacks_are_refused(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    base = ["train-student", "--student", tiny.student, "--shards", cache_path, "--output", tmp_path / "out"]
    warm = pipeline(*base, "--temperature", 2)
    sampled = pipeline(*base, "--tail", "sampled")
    together = pipeline(*base, "--tail", "drop", "--direction", "reverse")
    assert (warm.code, sampled.code, together.code) == (2, 2, 2)
    assert "holds the temperatures 1, not 2" in warm.err
    assert "--tail-samples" in sampled.err
    assert "needs --tail bucket" in together.err
    assert not (tmp_path / "out").exists()
