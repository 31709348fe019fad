"""Which sketch a cache is to have: of its own, of another cache, or the one that lies at its place already."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from stages.sketch_calibration import DEFAULT_POSITIONS, calibration_id
from storage.cache import MANIFEST, SKETCH, Cache
from storage.errors import CacheError, UserError
from storage.manifest import Manifest, SketchIdentity, TeacherIdentity
from storage.places import Place, place
from storage.sketch_file import SketchFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Drawn from what the codes miss.
DEFAULT_RESIDUAL_SAMPLES = 8


def residual_samples_of(given: int | None) -> int:
    """How many a sketch has where the option says this."""
    return DEFAULT_RESIDUAL_SAMPLES if given is None else given


def wanted_sketch(
    config: PretrainedConfig,
    teacher: TeacherIdentity,
    *,
    rank: int | None,
    residual_samples: int | None,
    positions: int | None,
    another: str | None,
) -> tuple[SketchIdentity | None, bytes | None]:
    """What the options say of a sketch, and its bytes where the cache `another` has it; else its checksum is not known
    yet.

    Raises UserError, and CacheError for another cache that has no sketch of this teacher.
    """
    if rank is None and another is None:
        for name, value in [("--residual-samples", residual_samples), ("--sketch-positions", positions)]:
            if value is not None:
                raise UserError(f"{name} {value}: means nothing without a sketch; add --sketch-rank")
        return None, None
    if residual_samples == 1:
        raise UserError("--residual-samples 1: cannot stand for both signs; give 0, 2 or more")
    residuals = residual_samples_of(residual_samples)
    if another is not None:
        identity, data = _sketch_of(another, teacher)
        if positions is not None or rank not in (None, identity.rank):
            raise UserError(
                f"--sketch-from {another}: its sketch has rank {identity.rank} and is calibrated already; leave out "
                "--sketch-rank and --sketch-positions"
            )
        return identity.model_copy(update={"residual_samples": residuals}), data
    assert rank is not None
    width = int(config.get_text_config().hidden_size)
    if rank > width:
        raise UserError(f"--sketch-rank {rank}: the teacher's hidden states have only {width} dimensions")
    positions = DEFAULT_POSITIONS if positions is None else positions
    if positions < rank:
        raise UserError(f"--sketch-positions {positions}: too few for --sketch-rank {rank}; give many times the rank")
    return SketchIdentity(rank=rank, residual_samples=residuals, positions=positions), None


def _sketch_of(another: str, teacher: TeacherIdentity) -> tuple[SketchIdentity, bytes]:
    """The sketch of a cache. Raises CacheError where it has none, or one of another teacher."""
    cache = Cache.open(another)
    data, identity, theirs = cache.sketch_bytes(), cache.manifest.scoring.sketch, cache.manifest.teacher
    assert identity is not None
    if (teacher.config_sha256, teacher.weights, teacher.revision) != (
        theirs.config_sha256,
        theirs.weights,
        theirs.revision,
    ):
        raise CacheError(f"--sketch-from {another}: its sketch is of another teacher")
    return identity, data


def sketch_there(output: str, manifest: Manifest) -> tuple[Manifest, bytes | None]:
    """The manifest naming the sketch that lies at `output`, and its bytes where they are whole.

    Raises CacheError for a sketch without a cache that another command left.
    """
    path = place(output)
    if manifest.scoring.sketch is None:
        return manifest, None
    if (path / MANIFEST).exists():
        there = Cache.open(path)
        if (identity := there.manifest.scoring.sketch) is None:
            return manifest, None
        try:
            data = there.sketch_bytes()
        except CacheError:
            data = None
        return _naming(manifest, identity.sha256), data
    data = Cache.claimed_sketch(path)
    return (manifest, None) if data is None else (claimed(path, manifest, data), data)


def claimed(path: Place, manifest: Manifest, data: bytes) -> Manifest:
    """The manifest naming a sketch that no manifest names yet. Raises CacheError where it is of something else."""
    sketch = manifest.scoring.sketch
    assert sketch is not None
    file = SketchFile.from_bytes(data, path / SKETCH, rank=sketch.rank, vocabulary_size=manifest.vocabulary_size)
    if file.about.get("calibration") != calibration_id(manifest):
        raise CacheError(
            f"{path / SKETCH}: another command left this sketch, of another teacher, corpus, engine or rank; "
            "name a new --output or remove the file"
        )
    return _naming(manifest, hashlib.sha256(data).hexdigest())


def _naming(manifest: Manifest, sha256: str | None) -> Manifest:
    """The manifest of the same cache with this sketch."""
    scoring = manifest.scoring
    assert scoring.sketch is not None
    named = scoring.model_copy(update={"sketch": scoring.sketch.model_copy(update={"sha256": sha256})})
    return manifest.model_copy(update={"scoring": named})
