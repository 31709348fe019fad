"""The dataset card: `README.md` of a cache, with the YAML header that dataset hubs read."""

from __future__ import annotations

import json

from stages.summary import QUANTILES, Summary
from storage.cache import Cache


def card(cache: Cache, summary: Summary) -> str:
    """Markdown. Everything in it comes from the manifest and the shards."""
    manifest = cache.manifest
    scoring = manifest.scoring
    columns = "\n".join(f"| `{c.name}` | {c.per} | {c.unit} | {c.meaning} |" for c in scoring.columns)
    quantiles = ", ".join(f"{q:.0%}: {value:.3g}" for q, value in zip(QUANTILES, summary.unc_quantiles, strict=True))
    source = _inline(str(manifest.source.get("dataset", "unknown")))
    top_n = f"{scoring.top_n}"
    if scoring.tail_epsilon:
        top_n = f"{scoring.min_n} to {top_n}, until less than {scoring.tail_epsilon:g} of the mass is left; "
        top_n += f"{summary.mean_top_n:.1f} on average"
    derived = ", ".join(f"{o.sequences} sequences of cache `{o.cache_id}`" for o in manifest.derived_from) or "text"
    revision = f" at revision `{manifest.teacher.revision}`" if manifest.teacher.revision else ""
    return f"""---
# JSON strings are YAML strings, whatever stands in them.
pretty_name: {json.dumps("Teacher log-probabilities of " + manifest.teacher.name)}
tags:
- knowledge-distillation
- teacher-logits
- teacher-logit-cache
configs:
- config_name: default
  data_files: shards/*.parquet
---

# Teacher log-probabilities of {_inline(manifest.teacher.name)}

What the teacher `{_inline(manifest.teacher.name)}`{revision} believed about every token of `{source}`: the
most probable tokens at each position with their log-probabilities, the log-probability of the token
that really came next, and the mass of all others. Students are trained from it without the teacher:

```
pip install teacher-logit-cache
pipeline train-student --student STUDENT --shards THIS_DIRECTORY --output OUTPUT
```

| | |
| --- | --- |
| cache id | `{manifest.cache_id}` (format version {manifest.format_version}) |
| teacher | `{_inline(manifest.teacher.name)}`, {_inline(manifest.teacher.architecture)}, scored in {scoring.dtype} |
| engine | {_inline(scoring.engine)} |
| made from | {derived} |
| vocabulary | {manifest.vocabulary_size} |
| sequences | {summary.sequences} |
| tokens | {summary.tokens} |
| positions with a loss | {summary.stored_positions} |
| shards | {summary.shards} |
| bytes per token | {summary.bytes_per_token:.1f} |
| top-N | {top_n} |
| sketch | {_sketch(cache, summary)} |
| extra temperatures | {", ".join(f"{t:g}" for t in scoring.temperatures) or "none"} |
| mean tail mass | {summary.mean_tail_mass:.4g} |
| mean UNC = 1 - p(gold) | {summary.mean_unc:.4g} |
| UNC quantiles | {quantiles} |
| teacher's cross-entropy (nats) | {summary.teacher_cross_entropy:.4f} |
| corpus fingerprint | `{manifest.corpus.fingerprint}` |

## Columns

One row is one sequence of L token ids with L-1 scored positions; position t predicts `input_ids[t+1]`. P positions
have the loss mask set and keep E entries in all. Log-probabilities are natural logs at temperature 1.

| column | length | unit | meaning |
| --- | --- | --- | --- |
{columns}

Before you share it: the token ids spell out the corpus, so its licence and the teacher's terms of use apply.
"""


def _sketch(cache: Cache, summary: Summary) -> str:
    sketch = cache.manifest.scoring.sketch
    if sketch is None:
        return "none"
    kl = "" if summary.mean_sketch_kl is None else f", KL from the teacher {summary.mean_sketch_kl:.4g} nats"
    return f"rank {sketch.rank}, {sketch.residual_samples} residual samples per position{kl}"


def _inline(text: str) -> str:
    """Text that cannot break out of a table cell or a code span."""
    return " ".join(text.replace("`", "'").replace("|", "/").replace("<", "&lt;").split())[:200]
