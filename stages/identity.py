"""Which teacher and which tokenizer: fingerprints that are cheap to take and hard to confuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stages.gguf_file import is_gguf
from storage.errors import UserError
from storage.manifest import TeacherIdentity, TokenizerIdentity

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf")
_SAMPLES = 64
_SAMPLE_BYTES = 65_536

# Texts on which tokenizers of the same vocabulary but other rules (merges, spaces, digits, Unicode) part ways.
# Changing one changes every `behaviour_sha256`: add a format version when you do.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading,   inner and trailing spaces  ",
    "\tdef f(x):\n\t\treturn x ** 2  # comment\n\n\n",
    "1234567890 3.14159 1,000,000 0x1F 2026-11-20",
    "don't can't I'LL WE'VE naïve café Ångström",
    "Größe, œuvre, señor, Привет, мир! Γειά σου",
    "日本語の文章、中文文本，한국어 문장",
    "السلام عليكم שלום नमस्ते",
    "🙂👩‍🚀🏳️‍🌈 ½ ² ﬁ №",
    "<html><b>a</b></html> {'json': [1, null, true]} https://example.org/?q=1&r=%20",
)


def teacher_identity(name: str, config: PretrainedConfig) -> TeacherIdentity:
    """The model behind `name`: its hub commit where it has one, its weights' fingerprint where they lie here."""
    plain = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    text = json.dumps(plain, sort_keys=True, default=str)
    path = Path(name)
    return TeacherIdentity(
        name=path.name if path.exists() else name,
        revision=getattr(config, "_commit_hash", None),
        architecture=architecture_of(config),
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        weights=weights_fingerprint(path) if path.exists() else None,
    )


def architecture_of(config: PretrainedConfig) -> str:
    """Return the name of the model class: as the configuration states it, or, of a GGUF file say, as it is loaded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stated = getattr(config, "architectures", None)
    found = stated or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) or type(config).__name__
    return str(found if isinstance(found, str) else found[0])


def weights_fingerprint(model: Path) -> str:
    """Return the sha256 over name, length and 64 evenly spread blocks of 64 KiB of every weight file.

    model: a directory, or a file that holds all weights.

    Reading 140 GB to hash it would cost minutes at every start; another training run of the same model differs in
    practically every block.
    """
    digest = hashlib.sha256()
    entries = model.iterdir() if model.is_dir() else [model]
    files = sorted(p for p in entries if p.name.endswith(_WEIGHT_ENDINGS) or is_gguf(p.name))
    if not files:
        raise UserError(f"{model}: holds no weights ({', '.join(_WEIGHT_ENDINGS)})")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for offset in _offsets(size):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _offsets(size: int) -> Iterator[int]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        yield from range(0, size, _SAMPLE_BYTES)
        return
    for sample in range(_SAMPLES):
        yield (size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> TokenizerIdentity:
    vocabulary = tokenizer.get_vocab()
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\0{token}\0".encode(errors="surrogatepass"))
    template = getattr(tokenizer, "chat_template", None)
    template_text = json.dumps(template, sort_keys=True) if template else None
    return TokenizerIdentity(
        vocabulary_sha256=digest.hexdigest(),
        behaviour_sha256=hashlib.sha256(json.dumps(probe(tokenizer)).encode()).hexdigest(),
        chat_template_sha256=hashlib.sha256(template_text.encode()).hexdigest() if template_text else None,
        tokens=len(vocabulary),
    )


def probe(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The probe texts as token ids, without special tokens."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
