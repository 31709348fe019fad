"""Models that are one GGUF file: where it is, and what transformers needs to read it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from storage.errors import UserError

ENDING = ".gguf"
_WHOLE = (".safetensors", ".bin")
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


def is_gguf(file: str) -> bool:
    """Tell whether a file of this name is a GGUF file."""
    return file.lower().endswith(ENDING)


def gguf_of(name: str) -> Path | None:
    """Return the GGUF file that `name` means: itself, or the only weights of a directory; None for other models.

    Raises UserError where there are several, where it is a part of a split one, or the gguf package is missing.
    """
    path = Path(name)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        found = [path / entry for entry in names if is_gguf(entry)]
        if not found or any(entry.endswith(_WHOLE) for entry in names):
            return None
        if len(found) > 1:
            raise UserError(f"{name}: holds {len(found)} GGUF files; name one of them, such as {found[0]}")
        path = found[0]
    elif not (is_gguf(path.name) and path.is_file()):
        return None
    if (part := _PART.search(path.name)) and int(part[1]) > 1:
        raise UserError(f"{path}: is a part of a split GGUF file, which transformers does not read; merge the parts")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path}: reading it needs gguf: pip install 'teacher-logit-cache[gguf]'")
    return path


def source_of(name: str) -> dict[str, Any]:
    """Return the arguments by which every `from_pretrained` of transformers finds the model called `name`."""
    path = gguf_of(name)
    if path is None:
        return {"pretrained_model_name_or_path": name}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def unpacked(source: dict[str, Any]) -> dict[str, Any]:
    """Return the option by which transformers unpacks a GGUF file's weights at once, the same on every device."""
    import transformers

    if "gguf_file" not in source or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}
