"""The options of stage one: what to cache, of which teacher, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.chat_settings import ChatSettings
from stages.engines import EngineOptions
from stages.sketch_identity import residual_samples_of
from stages.statistics import StatisticsOptions

# At most 64 bytes a token, and nearest to the live teacher for them: docs/fidelity.md.
DEFAULT_TOP_N = 4
DEFAULT_TAIL_SAMPLES = 28
# For students that no samples help: where there are none, and at other temperatures.
DEFAULT_TOP_N_ALONE = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CacheOptions:
    """Names the corpus, the teacher and the amount to cache.

    Lengths in tokens; `max_length` None: 2048 or the teacher's context.
    temperatures: besides 1. tail_samples: ids per position; None: DEFAULT_TAIL_SAMPLES, but 0 with a sketch, where
    vLLM's stock API scores, which cannot draw, and with a server, which decided when it was started. top_n: None:
    DEFAULT_TOP_N with samples, no further temperature and no tail_epsilon, else DEFAULT_TOP_N_ALONE. engine: of the
    teacher. tail_epsilon, min_n: as in StatisticsOptions; top_n is then the most that a position keeps.
    shard_tokens: tokens of a shard; None: see `plan_shards`.
    sketch_rank: codes per position; None for no sketch. residual_samples: ids per position drawn from what the codes
    miss; None: see `residual_samples_of`. sketch_positions: how many the sketch is calibrated on. sketch_from: a cache
    whose sketch, and its rank, is taken instead.
    chat: how the chat template is used. license, citation: for the dataset card; they change no number and are no part
    of the identity.
    """

    engine: EngineOptions
    dataset: str
    output: str
    top_n: int | None = None
    tail_epsilon: float = 0.0
    min_n: int = 1
    temperatures: tuple[float, ...] = ()
    tail_samples: int | None = None
    sketch_rank: int | None = None
    residual_samples: int | None = None
    sketch_positions: int | None = None
    sketch_from: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    overlong: str = "cut"
    logprob_bits: int = 16
    shard_tokens: int | None = None
    seed: int = 0
    columns: dict[str, str | None] = field(default_factory=dict)
    turns: str = "all"
    chat: ChatSettings = field(default_factory=ChatSettings)
    append_eos: bool = True
    split: str | None = None
    limit: int | None = None
    processes: int | None = None
    license: str | None = None
    citation: str | None = None

    def statistics(self) -> StatisticsOptions:
        samples = self._samples
        few = (samples or self._residual_samples) and not self.temperatures and not self.tail_epsilon
        default = DEFAULT_TOP_N if few else DEFAULT_TOP_N_ALONE
        return StatisticsOptions(
            default if self.top_n is None else self.top_n,
            self.temperatures,
            samples,
            self.seed,
            self.tail_epsilon,
            self.min_n,
            sketch_rank=self.sketch_rank or 0,
            residual_samples=self._residual_samples,
        )

    @property
    def _residual_samples(self) -> int:
        return 0 if self.sketch_rank is None else residual_samples_of(self.residual_samples)

    @property
    def _samples(self) -> int:
        if self.tail_samples is not None:
            return self.tail_samples
        if self.sketch_rank is not None:
            return 0
        engine = self.engine
        elsewhere = engine.vllm_route == "prompt-logprobs" or engine.on_server
        return 0 if elsewhere else DEFAULT_TAIL_SAMPLES
