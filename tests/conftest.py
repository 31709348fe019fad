"""One tiny teacher, student, tokenizer and corpus per test session, made on the spot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.threads import bound_spinning
from tests.pipeline.with_vllm import Forks
from tests.storage.s3 import Proxy, proxy_to

# Before torch is imported: threads that wait by spinning starve the processes that some tests start.
bound_spinning()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 509  # no multiple of 64, so that nothing leans on a padded head


@dataclass(frozen=True)
class Tiny:
    """Paths of what most tests need. The corpus is `rows` JSONL rows of real text; 128 tokens is the context."""

    root: Path
    tokenizer: Path
    teacher: Path
    student: Path
    corpus: Path
    rows: int


def texts() -> list[str]:
    """The first lines of some modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="ignore")[:3000] for path in sorted(library.glob("[a-h]*.py"))]


def make_tokenizer(path: Path, vocabulary: int = 500, seed_texts: list[str] | None = None) -> Any:
    """A byte-level BPE tokenizer, saved at `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(seed_texts or texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(path)
    return fast


def make_model(path: Path, tokenizer: Any = None, *, hidden: int = 32, seed: int = 0, peak: float = 1.0, **config: Any):
    """A random Llama, saved at `path` with the tokenizer. `peak` multiplies its head, so that it is sure of things."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**options, **config})).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(peak)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(root / "tokenizer")
    make_model(root / "teacher", tokenizer, peak=20.0)
    make_model(root / "student", tokenizer, hidden=16, seed=1, peak=4.0)
    rows = [text[start : start + 400] for text in texts() for start in (0, 400, 800)][:60]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return Tiny(root, root / "tokenizer", root / "teacher", root / "student", root / "corpus.jsonl", len(rows))


@pytest.fixture(scope="session", autouse=True)
def no_engine_logs() -> Iterator[None]:
    """Errors that tests provoke name the log of their engine; it need not stay."""
    yield
    from stages import engine_log

    engine_log.forget()


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def pipeline(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs the command line in this process: `pipeline("verify", path)`."""
    from pipeline.cli import run

    def call(*arguments: object) -> Finished:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def make_cache(tiny: Tiny) -> Callable[..., Any]:
    """Makes a cache of the tiny teacher in this process: `make_cache(path, top_n=8, ...)` -> storage.cache.Cache."""
    from stages.cache_options import CacheOptions
    from stages.caching import prepare, run
    from stages.engines import EngineOptions

    def make(output: Path, **options: Any) -> Any:
        engine = EngineOptions(str(tiny.teacher), "transformers")
        given = {"engine": engine, "dataset": str(tiny.corpus), "output": str(output), "top_n": 8}
        given |= {"tail_samples": 0, "shard_tokens": 1500, "processes": 1}
        cache, _ = run(prepare(CacheOptions(**{**given, **options})), lambda tokens: None)
        return cache

    return make


@pytest.fixture(scope="session")
def cache_path(tiny: Tiny, make_cache: Callable[..., Any]) -> Path:
    """A sealed cache that tests only read; copy it to change it."""
    path = tiny.root / "cache"
    make_cache(path)
    return path


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A process that has imported vLLM, and starts others."""
    forks = Forks(tmp_path_factory.mktemp("stderr"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """The port of an S3 API server on loopback."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A process of its own: what a web framework leaves in this one confuses an engine that runs in it.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1800):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the S3 server did not start"
            time.sleep(0.1)
        else:
            raise AssertionError("the S3 server did not answer within three minutes")
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(s3_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An empty bucket `bucket` behind a proxy that can fail; short pauses, copies of this test alone."""
    import boto3
    import fsspec

    from storage import places

    settings = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIPELINE_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(places, "FIRST_PAUSE", 0.005)
    with proxy_to(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        bucket = boto3.resource("s3", endpoint_url=f"http://127.0.0.1:{s3_server}").Bucket("bucket")
        bucket.create()
        bucket.objects.all().delete()
        # fsspec keeps file systems, and these the server's address.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy
