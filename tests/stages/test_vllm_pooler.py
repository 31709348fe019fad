"""The pooler without an engine: hidden states in, packed statistics out, whatever becomes of a request in between."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stages import vllm_plugin
from stages.sketch import HiddenMoments, calibrate
from stages.statistics import RowStatistics, StatisticsOptions, residual_uniforms, row_statistics, sample_uniforms
from stages.vllm_plugin import Chunk, PackedStatistics, StatisticsCollector, options_from_config, options_to_config

VOCABULARY, HIDDEN = 307, 16
OPTIONS = StatisticsOptions(8, (2.0, 0.7), 3, seed=(1 << 60) + 5)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class Prompt:
    """A random prompt with the hidden states that a body could have given for it."""

    def __init__(self, length: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.ids = generator.integers(0, VOCABULARY, length)
        self.mask = generator.random(length - 1) < 0.6
        self.hidden = torch.from_numpy(generator.standard_normal((length, HIDDEN)).astype(np.float32))

    def chunk(self, start: int, stop: int, key: int | None = 0) -> Chunk:
        return Chunk(self.ids, start, stop, self.mask, key)


@pytest.fixture(scope="module")
def head() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).standard_normal((HIDDEN, VOCABULARY)).astype(np.float32))


@pytest.fixture
def collector(head: torch.Tensor) -> StatisticsCollector:
    return StatisticsCollector(lambda hidden: hidden @ head, OPTIONS, VOCABULARY)


def expected(prompt: Prompt, head: torch.Tensor, prior: torch.Tensor | None = None) -> RowStatistics:
    return row_statistics(
        prompt.hidden[:-1] @ head,
        torch.from_numpy(prompt.ids[1:]),
        OPTIONS,
        uniforms=torch.from_numpy(sample_uniforms(prompt.ids, OPTIONS)),
        prior_sum=prior,
        prior_rows=torch.from_numpy(prompt.mask),
    )


def assert_is(found: tuple[torch.Tensor, torch.Tensor] | None, wanted: RowStatistics, mask: np.ndarray) -> None:
    assert found is not None
    dense, entries = found
    first = torch.stack([wanted.gold_logprob, wanted.tail_logmass, wanted.entropy], 1)
    torch.testing.assert_close(dense, torch.cat([first, wanted.tail_logmass_at], 1), atol=2e-6, rtol=1e-6)
    stored = torch.from_numpy(mask)
    assert torch.equal(entries[:, :8].long(), wanted.top_ids[stored])
    torch.testing.assert_close(entries[:, 8:16], wanted.top_logprobs[stored], atol=2e-6, rtol=1e-6)
    assert torch.equal(entries[:, 16:].long(), wanted.tail_samples[stored])


def join(parts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    dense, entries = zip(*parts, strict=True)
    return torch.cat(dense), torch.cat(entries)


def test_requests_of_a_step_do_not_mix(collector: StatisticsCollector, head: torch.Tensor) -> None:
    prompts = [Prompt(length, seed) for seed, length in enumerate((2, 31, 3, 17))]
    hidden = torch.cat([p.hidden for p in prompts])
    found = collector.collect(hidden, [p.chunk(0, len(p.ids), key) for key, p in enumerate(prompts)])
    prior = torch.zeros(VOCABULARY, dtype=torch.float64)
    for prompt, part in zip(prompts, found, strict=True):
        assert_is(part, expected(prompt, head, prior), prompt.mask)
    positions, total = collector.take_prior()
    assert positions == sum(int(p.mask.sum()) for p in prompts)
    np.testing.assert_allclose(total, prior, rtol=1e-5, atol=1e-7)
    assert collector.take_prior() == (0, None)


def test_adaptive_n_travels(head: torch.Tensor) -> None:
    """Entries behind a position's prefix come as -1, and the header names what decided."""
    prompt, options = Prompt(40, 3), replace(OPTIONS, tail_epsilon=0.3, min_n=2)
    assert options_from_config({vllm_plugin.CONFIG_KEY: options_to_config(options)}) == options
    collector = StatisticsCollector(lambda hidden: hidden @ head, options, VOCABULARY)
    parts = []
    for start, stop in ((0, 9), (9, 40)):
        parts += collector.collect(prompt.hidden[start:stop], [prompt.chunk(start, stop)])
    dense, entries = join(parts)
    packed = [torch.tensor(vllm_plugin._header(options, VOCABULARY, len(dense), len(entries)))]
    back = PackedStatistics.unpack(torch.cat([*packed, dense.flatten(), entries.flatten()]).numpy())
    assert back.options == options
    uniforms = torch.from_numpy(sample_uniforms(prompt.ids, options))
    gold = torch.from_numpy(prompt.ids[1:])
    wanted = row_statistics(prompt.hidden[:-1] @ head, gold, options, uniforms=uniforms)
    stored = torch.from_numpy(prompt.mask)
    assert np.array_equal(back.top_ids, wanted.top_ids[stored]) and len(set((back.top_ids >= 0).sum(1))) > 2
    np.testing.assert_allclose(back.top_logprobs, wanted.top_logprobs[stored], atol=2e-6)
    assert np.array_equal(back.tail_samples, wanted.tail_samples[stored])


@pytest.mark.parametrize("cuts", [[1], [9], [39], [1, 2, 3], list(range(1, 40))])
def test_chunks_add_up(collector: StatisticsCollector, head: torch.Tensor, cuts: list[int]) -> None:
    prompt = Prompt(40, 3)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 40], strict=True):
        parts += collector.collect(prompt.hidden[start:stop], [prompt.chunk(start, stop)])
    prior = torch.zeros(VOCABULARY, dtype=torch.float64)
    assert_is(join(parts), expected(prompt, head, prior), prompt.mask)
    positions, total = collector.take_prior()
    assert positions == prompt.mask.sum()
    np.testing.assert_allclose(total, prior, rtol=1e-5, atol=1e-7)


def test_a_preempted_request_counts_once_in_the_prior(collector: StatisticsCollector, head: torch.Tensor) -> None:
    prompt = Prompt(40, 3)
    for start, stop in ((0, 15), (15, 23), (0, 30), (30, 40)):
        collector.collect(prompt.hidden[start:stop], [prompt.chunk(start, stop)])
    prior = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected(prompt, head, prior)
    positions, total = collector.take_prior()
    assert positions == prompt.mask.sum()
    np.testing.assert_allclose(total, prior, rtol=1e-5, atol=1e-7)


def test_slices_of_rows_do_not_show(
    collector: StatisticsCollector, head: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_plugin, "rows_per_slice", lambda *_: 7)
    prompts = [Prompt(20, 1), Prompt(9, 2)]
    found = collector.collect(
        torch.cat([p.hidden for p in prompts]), [p.chunk(0, len(p.ids), k) for k, p in enumerate(prompts)]
    )
    for prompt, part in zip(prompts, found, strict=True):
        assert_is(part, expected(prompt, head), prompt.mask)


def test_out_of_memory_halves_the_rows(
    collector: StatisticsCollector, head: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def scarce(logits: torch.Tensor, *arguments: Any, prior_sum: torch.Tensor | None = None, **more: Any):
        sizes.append(len(logits))
        if len(logits) > 6:
            # As late as can be: the logits have been worked on; the prior has its part only in the end.
            row_statistics(logits, *arguments, **more)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row_statistics(logits, *arguments, prior_sum=prior_sum, **more)

    monkeypatch.setattr(vllm_plugin, "row_statistics", scarce)
    prompt = Prompt(20, 1)
    found = collector.collect(prompt.hidden, [prompt.chunk(0, 20)])
    assert sizes == [20, 10, 5, 5, 10, 5, 5]
    prior = torch.zeros(VOCABULARY, dtype=torch.float64)
    assert_is(found[0], expected(prompt, head, prior), prompt.mask)
    np.testing.assert_allclose(collector.take_prior()[1], prior, rtol=1e-5, atol=1e-7)


def test_out_of_memory_at_one_row_is_told(collector: StatisticsCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_plugin, "row_statistics", never)
    with pytest.raises(torch.OutOfMemoryError):
        collector.collect(Prompt(20, 1).hidden, [Prompt(20, 1).chunk(0, 20)])


def test_other_ranks_take_part_and_keep_nothing(head: torch.Tensor) -> None:
    calls = []
    collector = StatisticsCollector(
        lambda hidden: calls.append(len(hidden)),
        OPTIONS,
        VOCABULARY,
        collects=False,
    )
    prompt = Prompt(20, 1)
    assert collector.collect(prompt.hidden, [prompt.chunk(0, 20)]) == [None]
    assert calls == [20]


def test_ties_of_bfloat16_logits(head: torch.Tensor) -> None:
    """Coarse logits tie inside the top-N: the order stays descending and gold keeps one log-probability."""
    collector = StatisticsCollector(lambda hidden: (hidden @ head).round().bfloat16(), OPTIONS, VOCABULARY)
    prompt = Prompt(200, 5)
    prompt.mask[:] = True
    prompt.ids[1::2] = (prompt.hidden @ head).argmax(1).numpy()[0::2]  # often gold is among the first
    ((dense, entries),) = collector.collect(prompt.hidden, [prompt.chunk(0, 200)])
    ids, logprobs = entries[:, :8].long(), entries[:, 8:16]
    assert (logprobs.diff(dim=1) <= 0).all()
    assert (logprobs.diff(dim=1).abs() < 1e-6).any()
    assert all(len(set(row.tolist())) == 8 for row in ids)
    is_gold = ids == torch.from_numpy(prompt.ids[1:, None])
    assert is_gold.any(1).sum() > 50
    assert torch.equal(logprobs[is_gold], dense[is_gold.any(1), 0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="top_n is 400"):
        StatisticsCollector(lambda h: h, StatisticsOptions(400), VOCABULARY)
    with pytest.raises(ValueError, match="does not fit"):
        StatisticsCollector(lambda h: h, StatisticsOptions(4), 1 << 24)
    with pytest.raises(RuntimeError, match="16 wide"):
        StatisticsCollector(lambda h: h, StatisticsOptions(4), VOCABULARY).collect(
            Prompt(4, 0).hidden, [Prompt(4, 0).chunk(0, 4)]
        )


# Packing


# With a sketch

SKETCHED = replace(OPTIONS, residual_samples=5, sketch_rank=4)


def moments_of(prompts: list[Prompt]) -> HiddenMoments:
    moments = HiddenMoments(HIDDEN)
    for prompt in prompts:
        moments.add(prompt.hidden[:-1][torch.from_numpy(prompt.mask)])
    return moments


def test_a_sketch_of_every_stored_position_once_on_all_ranks_alike(head: torch.Tensor) -> None:
    """Chunks, a preempted request, and a rank without logits, which must be asked as often as the one that has them."""
    calls: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def compute(collects: bool) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def logits(hidden: torch.Tensor) -> torch.Tensor | None:
            calls[collects].append(hidden)
            return 2.0 * (hidden @ head) + 0.25 if collects else None

        return logits

    prompts = [Prompt(40, 1), Prompt(23, 2), Prompt(2, 3)]
    sketches = []
    for collects in (True, False):
        collector = StatisticsCollector(compute(collects), SKETCHED, VOCABULARY, collects=collects)
        if collects:
            with pytest.raises(RuntimeError, match="before the workers have the sketch"):
                collector.collect(prompts[0].hidden, [prompts[0].chunk(0, 40)])
        else:
            # It never has one, and must not leave the others waiting.
            assert collector.collect(prompts[0].hidden, [prompts[0].chunk(0, 40)]) == [None]
            assert len(calls[collects]) == 1
        calls[collects].clear()
        collector.start_moments()
        for start, stop in ((0, 15), (15, 23), (0, 30), (30, 40)):
            collector.collect(prompts[0].hidden[start:stop], [prompts[0].chunk(start, stop)])
        both = torch.cat([p.hidden for p in prompts[1:]])
        pieces = collector.collect(both, [p.chunk(0, len(p.ids), 1 + k) for k, p in enumerate(prompts[1:])])
        lengths = [None if piece is None else (len(piece[0]), len(piece[1])) for piece in pieces]
        assert lengths == [(len(p.mask), p.mask.sum()) if collects else None for p in prompts[1:]]
        assert calls[collects] == []
        sketches.append(collector.take_sketch(SKETCHED.sketch_rank, None))
    assert sketches[1] is None
    assert [len(hidden) for hidden in calls[True]] == [len(hidden) for hidden in calls[False]]
    assert all(torch.equal(one, other) for one, other in zip(*calls.values(), strict=True))
    ours, wanted = sketches[0], calibrate(moments_of(prompts), 2.0 * head.T, torch.full((VOCABULARY,), 0.25), 4)
    assert ours is not None
    for name in ("basis", "bias", "encoder", "mean", "scales", "explained"):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), atol=2e-3, rtol=1e-3)
    # And then, statistics again.
    collector = StatisticsCollector(lambda hidden: hidden @ head, OPTIONS, VOCABULARY)
    collector.start_moments()
    collector.collect(prompts[0].hidden, [prompts[0].chunk(0, 40)])
    collector.take_sketch(3, None)
    (found,) = collector.collect(prompts[0].hidden, [prompts[0].chunk(0, 40)])
    assert_is(found, expected(prompts[0], head), prompts[0].mask)
    assert collector.take_prior()[0] == prompts[0].mask.sum()


@pytest.mark.parametrize("rows", [7, 1000])
def test_codes_and_residuals_are_those_of_the_rows(
    head: torch.Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_plugin, "rows_per_slice", lambda *_: rows)
    prompts = [Prompt(20, 1), Prompt(9, 2)]
    collector = StatisticsCollector(lambda hidden: hidden @ head, SKETCHED, VOCABULARY)
    collector.sketch = sketch = calibrate(moments_of([Prompt(200, 5)]), head.T, None, 4)
    found = collector.collect(
        torch.cat([p.hidden for p in prompts]), [p.chunk(0, len(p.ids), k) for k, p in enumerate(prompts)]
    )
    for prompt, part in zip(prompts, found, strict=True):
        codes = sketch.encode(prompt.hidden[:-1])
        wanted = row_statistics(
            prompt.hidden[:-1] @ head,
            torch.from_numpy(prompt.ids[1:]),
            SKETCHED,
            uniforms=torch.from_numpy(sample_uniforms(prompt.ids, SKETCHED)),
            sketch_logits=sketch.logits(codes),
            residual_uniforms=torch.from_numpy(residual_uniforms(prompt.ids, SKETCHED)),
        )
        assert part is not None
        back = PackedStatistics.unpack(packed(SKETCHED, VOCABULARY, *(piece.numpy() for piece in part)))
        assert back.options.sketch_rank == 4 and back.options.residual_samples == 5
        mask = torch.from_numpy(prompt.mask)
        np.testing.assert_array_equal(back.tail_samples, wanted.tail_samples[mask])
        assert back.sketch["sketch_codes"].dtype == np.uint8
        np.testing.assert_array_equal(back.sketch["sketch_codes"], codes[mask])
        np.testing.assert_array_equal(back.sketch["residual_samples"], wanted.residual_samples[mask])
        np.testing.assert_allclose(back.sketch["residual_mass"], wanted.residual_mass[mask], rtol=1e-5)
        np.testing.assert_allclose(back.sketch["sketch_kl"], wanted.sketch_kl[mask], atol=1e-5)


def test_memory_is_measured_before_there_is_a_sketch(head: torch.Tensor) -> None:
    """By requests that are nobody's: they cost what real ones will, and hold codes of 0."""
    collector = StatisticsCollector(lambda hidden: hidden @ head, SKETCHED, VOCABULARY)
    prompt = Prompt(9, 2)
    (found,) = collector.collect(prompt.hidden, [Chunk(prompt.ids, 0, 9)])
    assert found is not None
    back = PackedStatistics.unpack(packed(SKETCHED, VOCABULARY, *(piece.numpy() for piece in found)))
    assert (back.sketch["sketch_codes"] == 0).all() and (back.sketch["residual_mass"] > 0).all()


def packed(options: StatisticsOptions, vocabulary: int, dense: np.ndarray, entries: np.ndarray) -> np.ndarray:
    header = vllm_plugin._header(options, vocabulary, len(dense), len(entries))
    return np.concatenate([np.array(header, np.float32), dense.ravel(), entries.ravel()]).astype(np.float32)


def test_packing_is_exact() -> None:
    vocabulary = (1 << 24) - 1
    options = StatisticsOptions(2, (2.0, 0.7, 1 / 3), 1, seed=(1 << 63) + 12345)
    dense = np.array([[-1e-9, -np.inf, 0.0, 1.0, 2.0, 3.0]] * 3, np.float32)
    entries = np.array([[vocabulary - 1, 5, -1e-9, -20.0, -1]], np.float32)
    back = PackedStatistics.unpack(packed(options, vocabulary, dense, entries))
    assert back.vocabulary_size == vocabulary
    assert back.options.top_n == 2
    assert back.options.seed == options.seed
    assert back.options.temperatures[:2] == (2.0, 0.7)
    np.testing.assert_array_equal(back.dense, dense)
    assert back.top_ids.tolist() == [[vocabulary - 1, 5]]
    assert back.tail_samples.tolist() == [[-1]]
    np.testing.assert_array_equal(back.top_logprobs, entries[:, 2:4])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p[:-1],
        lambda p: p[:5],
        lambda p: p.astype(np.float64),
        lambda p: p.reshape(1, -1),
        lambda p: np.where(np.arange(len(p)) == 0, 1.0, p).astype(np.float32),
        lambda p: np.where(np.arange(len(p)) == 1, 1.0, p).astype(np.float32),
        lambda p: np.where(np.arange(len(p)) == 3, -3.0, p).astype(np.float32),
        lambda p: np.where(np.arange(len(p)) == 3, np.nan, p).astype(np.float32),
    ],
)
def test_damage_is_refused(spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    whole = packed(StatisticsOptions(2), 100, np.zeros((3, 3)), np.zeros((2, 4)))
    PackedStatistics.unpack(whole)
    with pytest.raises(ValueError, match=r"packed statistics|pooler"):
        PackedStatistics.unpack(spoil(whole))


def test_options_travel_as_json() -> None:
    import json

    config = json.loads(json.dumps({vllm_plugin.CONFIG_KEY: options_to_config(OPTIONS)}))
    assert options_from_config(config) == OPTIONS
    assert options_from_config({vllm_plugin.CONFIG_KEY: options_to_config(SKETCHED)}) == SKETCHED
    for wrong in ({}, None, {vllm_plugin.CONFIG_KEY: {"top_n": "many"}}):
        with pytest.raises(ValueError, match="additional_config"):
            options_from_config(wrong)


# What vLLM sees


@needs_vllm
def test_every_architecture_is_offered_once_more() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    vllm_plugin.register()
    vllm_plugin.register()
    names = set(ModelRegistry.get_supported_archs())
    own = {n for n in names if n.startswith(vllm_plugin.ARCHITECTURE_PREFIX)}
    assert own == {vllm_plugin.statistics_architecture(n) for n in names - own}
    assert not any(n.startswith(2 * vllm_plugin.ARCHITECTURE_PREFIX) for n in names)
    for name, adjust in list(MODELS_CONFIG_MAP.items()):
        if not name.startswith(vllm_plugin.ARCHITECTURE_PREFIX):
            assert MODELS_CONFIG_MAP[vllm_plugin.statistics_architecture(name)] is adjust


@needs_vllm
def test_the_model_class_is_the_registered_one_and_pools() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    vllm_plugin.register()
    made = ModelRegistry.models[vllm_plugin.statistics_architecture("LlamaForCausalLM")].load_model_cls()
    assert issubclass(made, LlamaForCausalLM)
    assert made.is_pooling_model
    assert made is ModelRegistry.models["TeacherStatisticsLlamaForCausalLM"].load_model_cls()
    with pytest.raises(AttributeError):
        vllm_plugin.nothing_of_the_kind  # noqa: B018


@needs_vllm
def test_a_request_is_packed_when_it_ends(head: torch.Tensor) -> None:
    """The pooler's side of chunked prefill, preemption and the memory profiling run, with vLLM's own bookkeeping."""
    from vllm.pooling_params import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    collector = StatisticsCollector(lambda hidden: hidden @ head, OPTIONS, VOCABULARY)
    pooler = vllm_plugin._pooler_class()(collector)
    one, two = Prompt(12, 1), Prompt(7, 2)
    states = {"one": PoolingStates(), "two": PoolingStates()}

    def step(*spans: tuple[str, Prompt, int, int]) -> list[torch.Tensor | None]:
        longest = max(len(p.ids) for _, p, _, _ in spans)
        prompts = torch.stack([torch.from_numpy(np.pad(p.ids, (0, longest - len(p.ids)))) for _, p, _, _ in spans])
        params = [
            PoolingParams(task="token_embed", extra_kwargs=vllm_plugin.request_extras(k, p.mask))
            for k, (_, p, _, _) in enumerate(spans)
        ]
        metadata = PoolingMetadata(
            prompt_lens=torch.tensor([len(p.ids) for _, p, _, _ in spans]),
            prompt_token_ids=None,
            prompt_token_ids_cpu=prompts,
            pooling_params=params,
            pooling_states=[states[name] for name, _, _, _ in spans],
        )
        metadata.build_pooling_cursor(
            np.array([stop - start for _, _, start, stop in spans]),
            torch.tensor([stop for _, _, _, stop in spans]),
            device=torch.device("cpu"),
        )
        return pooler(torch.cat([p.hidden[start:stop] for _, p, start, stop in spans]), metadata)

    assert step(("one", one, 0, 5)) == [None]
    first, second = step(("one", one, 5, 9), ("two", two, 0, 7))
    assert first is None
    assert second is not None
    back = PackedStatistics.unpack(second.numpy())
    assert_is((torch.from_numpy(back.dense), torch.from_numpy(back.entries)), expected(two, head), two.mask)

    # Preempted, and scored again from its start.
    assert step(("one", one, 0, 10)) == [None]
    (first,) = step(("one", one, 10, 12))
    assert first is not None
    back = PackedStatistics.unpack(first.numpy())
    assert_is((torch.from_numpy(back.dense), torch.from_numpy(back.entries)), expected(one, head), one.mask)
    assert states["one"].hidden_states_cache == []

    with pytest.raises(RuntimeError, match="not computed"):
        step(("two", two, 3, 7))


@needs_vllm
def test_the_profiling_run_may_have_shorter_prompts(head: torch.Tensor) -> None:
    pooler = vllm_plugin._pooler_class()(StatisticsCollector(lambda hidden: hidden @ head, OPTIONS, VOCABULARY))
    cursor = SimpleNamespace(num_scheduled_tokens_cpu=torch.tensor([4, 6]), seq_lens_cpu=torch.tensor([4, 6]))
    metadata = SimpleNamespace(
        get_pooling_cursor=lambda: cursor,
        get_prompt_token_ids_cpu=lambda: [torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)],
        prompt_lens=torch.tensor([4, 6]),
        pooling_params=[SimpleNamespace(extra_kwargs=None)] * 2,
        pooling_states=[SimpleNamespace(hidden_states_cache=[], clean=lambda: None) for _ in range(2)],
    )
    assert all(output is not None for output in pooler(torch.randn(10, HIDDEN), metadata))
