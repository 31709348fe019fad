"""The dataset card: `README.md` of a cache, with the YAML header that dataset hubs read."""

from __future__ import annotations

import json
import re

from stages.summary import QUANTILES, Summary
from storage.cache import Cache
from storage.words import counted


def card(cache: Cache, summary: Summary) -> str:
    """Markdown. Everything in it comes from the manifest and the shards."""
    manifest = cache.manifest
    scoring = manifest.scoring
    columns = "\n".join(f"| `{c.name}` | {c.per} | {c.unit} | {c.meaning} |" for c in manifest.columns)
    quantiles = ", ".join(f"{q:.0%}: {value:.3g}" for q, value in zip(QUANTILES, summary.unc_quantiles, strict=True))
    source = _code(manifest.source.get("dataset", "unknown"))
    top_n = f"{scoring.top_n}"
    if scoring.tail_epsilon:
        top_n = f"{scoring.min_n} to {top_n}, until less than {scoring.tail_epsilon:g} of the mass is left; "
        top_n += f"{summary.mean_top_n:.1f} on average"
    derived = (
        ", ".join(f"{counted(o.sequences, 'sequence')} of cache `{_code(o.cache_id)}`" for o in manifest.derived_from)
        or "text"
    )
    revision = f" at revision `{_code(manifest.teacher.revision)}`" if manifest.teacher.revision else ""
    licence = manifest.source.get("license")
    license_line = f"license: {json.dumps(str(licence))}\n" if licence else ""
    temperatures = "".join(f", {t:g}" for t in scoring.temperatures)
    temperatures = f"s 1{temperatures}" if temperatures else " 1"
    weights = f"sha256 {manifest.teacher.weights[:16]}... of a sample" if manifest.teacher.weights else "as on the hub"
    made_with = ", ".join(f"{_inline(k)} {_inline(v)}" for k, v in manifest.made_with.items() if k != "engine")
    data = f", split {_inline(str(manifest.source['split']))}" if "split" in manifest.source else ""
    data += f", the first {_rows(manifest.source['limit'])}" if "limit" in manifest.source else ""
    citation = manifest.source.get("citation")
    citation = f"\nTo cite the source of the text:\n\n```text\n{_block(str(citation))}\n```\n" if citation else ""
    return f"""---
# JSON strings are YAML strings, whatever stands in them.
pretty_name: {json.dumps("Teacher log-probabilities of " + manifest.teacher.name)}
{license_line}task_categories:
- text-generation
size_categories:
- {_size_category(summary.sequences)}
tags:
- knowledge-distillation
- teacher-logits
- teacher-logit-cache
configs:
- config_name: default
  data_files: shards/*.parquet
---

# Teacher log-probabilities of {_inline(manifest.teacher.name)}

What the teacher `{_code(manifest.teacher.name)}`{revision} believed about every token of `{source}`: the
most probable tokens at each position with their log-probabilities, the log-probability of the token
that really came next, and the mass of all others. Students are trained from it without the teacher:

```
pip install teacher-logit-cache
pipeline train-student --student STUDENT --shards THIS_DIRECTORY --output OUTPUT
```

STUDENT is any causal language model with the teacher's tokenizer, which lies in `tokenizer/`. It can be trained at the
temperature{temperatures}. THIS_DIRECTORY may be a URL, `hf://datasets/...` or `s3://...`. `pipeline verify
THIS_DIRECTORY` checks every byte, and `pipeline audit THIS_DIRECTORY --teacher TEACHER` compares a sample with the
teacher itself.

## Teacher and data

| | |
| --- | --- |
| cache id | `{manifest.cache_id}` (format version {manifest.format_version}) |
| teacher | `{_code(manifest.teacher.name)}`, {_inline(manifest.teacher.architecture)}, in {_inline(scoring.dtype)} |
| teacher's weights | {_inline(weights)} |
| engine | {_inline(scoring.engine)}; {made_with} |
| made from | {derived} |
| data | `{source}`{data} |
| longest sequence | {scoring.max_length} tokens |
| corpus fingerprint | `{_code(manifest.corpus.fingerprint)}` |
| licence | {_inline(str(licence)) if licence else "not stated"} |
| vocabulary | {manifest.vocabulary_size} |

## Statistics

| | |
| --- | --- |
| sequences | {summary.sequences} |
| tokens | {summary.tokens} |
| positions with a loss | {summary.stored_positions} |
| shards | {summary.shards} |
| bytes per token | {summary.bytes_per_token:.1f} |
| top-N | {top_n} |
| tail samples per position | {scoring.tail_samples} |
| sketch | {_sketch(cache, summary)} |
| extra temperatures | {", ".join(f"{t:g}" for t in scoring.temperatures) or "none"} |
| mean tail mass | {summary.mean_tail_mass:.4g} |
| mean UNC = 1 - p(gold) | {summary.mean_unc:.4g} |
| UNC quantiles | {quantiles} |
| teacher's cross-entropy (nats) | {summary.teacher_cross_entropy:.4f} |

## Columns

One row is one sequence of L token ids with L-1 scored positions; position t predicts `input_ids[t+1]`. P positions
have the loss mask set and keep E entries in all. Log-probabilities are natural logs at temperature 1.

| column | length | unit | meaning |
| --- | --- | --- | --- |
{columns}

## Licence and citation

The token ids spell out the corpus, so its licence and the teacher's terms of use apply, whatever is stated above.
{citation}"""


def _size_category(rows: int) -> str:
    """As dataset hubs name them."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    power = len(str(rows)) - 1
    if power < 3:
        return "n<1K"
    return f"{steps[power - 3]}<n<{steps[power - 2]}" if power < 12 else "n>1T"


def _sketch(cache: Cache, summary: Summary) -> str:
    sketch = cache.manifest.scoring.sketch
    if sketch is None:
        return "none"
    kl = "" if summary.mean_sketch_kl is None else f", KL from the teacher {summary.mean_sketch_kl:.4g} nats"
    return f"rank {sketch.rank}, {sketch.residual_samples} residual samples per position{kl}"


def _rows(limit: object) -> str:
    return counted(limit, "row") if isinstance(limit, int) else _inline(limit)


def _code(text: object) -> str:
    """Text that cannot break out of a code span in a table."""
    return _line(text).replace("`", "'").replace("|", "/")


def _inline(text: object) -> str:
    """Text that is neither Markdown nor HTML: no emphasis, link, image, tag or cell comes of it, and no address."""
    escaped = re.sub(r"([\\`*_\[\]!|~$])", r"\\\1", _line(text).replace("&", "&amp;").replace("<", "&lt;"))
    # Addresses become links by themselves.
    return escaped.replace("://", ":&#47;/").replace("www.", "www&#46;").replace("@", "&#64;")


def _line(text: object) -> str:
    """One line of at most 200 characters, without those that control or turn it."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())[:200]


def _block(text: str) -> str:
    """Text that cannot end the code block it stands in, without characters that control or turn it."""
    lines = (line.replace("```", "'''").replace("~~~", "'''") for line in text.strip().splitlines())
    return "\n".join("".join(char for char in line if char.isprintable()) for line in lines)[:5000]
