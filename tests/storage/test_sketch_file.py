"""A cache's sketch: one file of one identity, carried wherever the cache goes, and never taken for another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from storage.bundle import bundle, unbundle
from storage.cache import Cache
from storage.errors import CacheError
from storage.integrity import problems
from storage.manifest import SketchIdentity
from storage.rows import Rows
from storage.shard import structure_problems, value_problems
from storage.sketch_file import SHAPES, SketchFile
from storage.transfer import copy_cache
from tests.storage.s3 import Proxy, files
from tests.storage.synthetic import make_manifest, make_rows, make_sketch, replaced, sketch_options, write_cache

KEY = "teacher_logit_cache.sketch"
SKETCH = make_sketch(vocabulary=40)
MANIFEST = make_manifest(vocabulary=40, top_n=16, sketch=sketch_options(SKETCH))
ROWS, _ = make_rows(MANIFEST, 1)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = write_cache(tmp_path / "cache", MANIFEST, sketch=SKETCH)
    made.write_tokenizer(lambda folder: (folder / "tokenizer_config.json").write_text("{}"))
    return made


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def test_it_comes_back_as_it_was(cache: Cache) -> None:
    back = Cache.open(cache.path).sketch()
    assert back.about == {"logit_scale": 1.0, "soft_cap": None}
    for name, (_, kind) in SHAPES.items():
        assert back.tensors[name].dtype == kind
        np.testing.assert_array_equal(back.tensors[name], SKETCH.tensors[name])
    assert list(problems(cache)) == []
    # Equal sketches are equal bytes, or two workers would not agree.
    assert back.to_bytes() == SKETCH.to_bytes()
    assert load(SKETCH.to_bytes()).keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"basis": np.zeros((40, 4), np.float16)}, "basis has 4 r, 3 belong there"),
        ({"basis": np.zeros((41, 3), np.float16)}, "basis has 41 V, 40 belong there"),
        ({"mean": np.zeros(7, np.float32)}, "mean has 7 H, 6 belong there"),
        ({"bias": np.full(40, np.nan, np.float32)}, "bias is not finite float32"),
        ({"bias": np.zeros(40)}, "bias is not finite float32"),
        ({"bias": np.full(40, 1e30, np.float32)}, "bias is above 1e.12"),
        ({"scales": np.zeros(3, np.float32)}, "scales are not positive"),
        ({"scales": np.full(3, 1e9, np.float32)}, "scales are not positive, up to 1000"),
        ({"explained": np.zeros(0, np.float32)}, "explained is empty"),
        ({"encoder": None}, r"has no encoder \[r H\]"),
        ({"encoder": np.zeros(3, np.float32)}, r"has no encoder \[r H\]"),
    ],
)
def test_what_is_no_sketch_of_this_cache(tmp_path: Path, change: dict, said: str) -> None:
    tensors = {name: value for name, value in {**SKETCH.tensors, **change}.items() if value is not None}
    data = save(tensors, {KEY: "{}"})
    with pytest.raises(CacheError, match=f"^there: {said}"):
        SketchFile.from_bytes(data, Path("there"), rank=3, vocabulary_size=40)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("{}", "names no logit_scale"),
        ("[]", "names no logit_scale"),
        ('{"logit_scale": "1"}', "names no logit_scale"),
        ('{"logit_scale": NaN}', "names no logit_scale"),
        ('{"logit_scale": true}', "names no logit_scale"),
        (f'{{"logit_scale": 1{"0" * 400}}}', "names no logit_scale"),
        ('{"logit_scale": 1.0, "soft_cap": 0}', "its soft_cap is no number above 0"),
        ('{"logit_scale": 1.0, "soft_cap": -3}', "its soft_cap is no number above 0"),
        ('{"logit_scale": 1.0, "soft_cap": [3]}', "its soft_cap is no number above 0"),
        ("[" * 10**5, "not a sketch"),
        ("9" * 10**5, "not a sketch"),
    ],
)
def test_what_it_says_about_itself(about: str, said: str) -> None:
    with pytest.raises(CacheError, match=f"^there: {said}"):
        SketchFile.from_bytes(save(dict(SKETCH.tensors), {KEY: about}), "there", rank=3, vocabulary_size=40)


def test_a_file_far_larger_than_any_sketch_is_not_read(cache: Cache, tmp_path: Path) -> None:
    os.truncate(tmp_path / "cache" / "sketch.safetensors", 1 << 40)
    with pytest.raises(CacheError, match=r"sketch\.safetensors: has 1099511627776 bytes, more than"):
        cache.sketch()


@pytest.mark.parametrize("data", [b"", b"\0" * 20, b"{}", SKETCH.to_bytes()[:-1], save(dict(SKETCH.tensors))])
def test_bytes_that_are_no_sketch(data: bytes) -> None:
    with pytest.raises(CacheError, match=r"^there: not a sketch"):
        SketchFile.from_bytes(data, Path("there"), rank=3, vocabulary_size=40)


def test_its_checksum_is_part_of_the_identity() -> None:
    other = make_sketch(vocabulary=40, seed=1)
    assert MANIFEST.cache_id != make_manifest(vocabulary=40, top_n=16, sketch=sketch_options(other)).cache_id
    # A cache without one has the identity that it had before there were sketches.
    assert "sketch" not in make_manifest().identity["scoring"]


def test_the_first_worker_makes_it_and_the_second_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    ours, theirs = SKETCH.to_bytes(), make_sketch(vocabulary=40, seed=1).to_bytes()
    assert Cache.claimed_sketch(path) is None
    assert Cache.claim_sketch(path, ours) == ours == Cache.claimed_sketch(path)
    assert Cache.claim_sketch(path, theirs) == ours
    # Killed here, before the manifest: the directory can still become the cache.
    Cache.check_target(path)
    assert list(problems(write_cache(path, MANIFEST, sketch=SKETCH))) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "sketch.safetensors: its bytes have changed"),
        (Path.unlink, "sketch.safetensors: the sketch of this cache"),
    ],
)
def test_damage_is_named(cache: Cache, tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(tmp_path / "cache" / "sketch.safetensors")
    [problem] = problems(cache)
    assert said in problem
    with pytest.raises(CacheError, match=said):
        cache.sketch()
    with pytest.raises(CacheError, match=said):
        bundle(cache, tmp_path / "cache.tar.zst")
    with pytest.raises(CacheError, match=r"sketch\.safetensors: "):
        copy_cache(cache, tmp_path / "copy")
    with pytest.raises(CacheError, match="name a new --output"):
        cache.write_sketch(make_sketch(vocabulary=40, seed=1).to_bytes())
    cache.write_sketch(SKETCH.to_bytes())
    assert list(problems(cache)) == []


def test_a_manifest_that_names_no_checksum(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "manifest.json"
    plain = json.loads(path.read_text())
    plain["scoring"]["sketch"]["sha256"] = None
    path.write_text(json.dumps(plain))
    with pytest.raises(CacheError, match="names no checksum of the sketch"):
        Cache.open(cache.path).sketch()


def test_a_bundle_carries_it(cache: Cache, tmp_path: Path) -> None:
    bundle(cache, tmp_path / "cache.tar.zst")
    opened = unbundle(tmp_path / "cache.tar.zst", tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "cache")
    assert opened.sketch().to_bytes() == SKETCH.to_bytes()


def test_push_and_pull_carry_it(cache: Cache, tmp_path: Path, s3: Proxy) -> None:
    copy_cache(cache, "s3://bucket/cache")
    remote = Cache.open("s3://bucket/cache")
    assert remote.sketch().to_bytes() == SKETCH.to_bytes()
    assert list(problems(remote)) == []
    copy_cache(remote, tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "cache")
    (remote.path / "sketch.safetensors").upload(tmp_path / "cache" / "manifest.json")
    [problem] = problems(Cache.open("s3://bucket/cache"))
    assert "sketch.safetensors: its bytes have changed" in problem


def with_value(name: str, index: int, value: float) -> Rows:
    changed = ROWS[name].values.copy()
    changed[index] = value
    return replaced(ROWS, **{name: changed})


def test_values_that_cannot_be() -> None:
    mask = np.flatnonzero(ROWS["loss_mask"].values)
    assert list(structure_problems(ROWS, MANIFEST, 1)) == list(value_problems(ROWS, MANIFEST)) == []
    row = int(np.searchsorted(ROWS["loss_mask"].offsets, mask[1], side="right")) - 1
    where = f"row {row}, position {mask[1] - ROWS['loss_mask'].offsets[row]}: "
    top = int(ROWS["top_ids"].values[16])
    for rows, said in [
        (with_value("sketch_codes", 3, 0), "a sketch code is 0, they are 1..255"),
        (with_value("residual_samples", 5, 40), "residual sample 40 is outside 0..39"),
        (with_value("residual_samples", 5, -1), "residual sample -1 is outside 0..39"),
        (with_value("residual_samples", 4, top), f"residual sample {top} is in the top-N"),
        (with_value("residual_mass", 1, -0.5), "residual_mass is -0.5, not between 0 and 2"),
        (with_value("residual_mass", 1, 2.1), "residual_mass is 2.0"),
        (with_value("residual_mass", 1, np.nan), "residual_mass is nan"),
    ]:
        assert [problem[: len(where + said)] for problem in value_problems(rows, MANIFEST)] == [where + said]
    # Where nothing is left over, nothing was drawn.
    nothing = ROWS["residual_mass"].values.copy()
    nothing[1] = 0
    assert list(value_problems(replaced(with_value("residual_samples", 4, top), residual_mass=nothing), MANIFEST)) == []


@pytest.mark.parametrize("name", ["sketch_codes", "residual_samples", "residual_mass"])
def test_another_number_of_values(name: str) -> None:
    wrong = make_manifest(vocabulary=40, top_n=16, sketch=SketchIdentity(rank=2, residual_samples=5, positions=9))
    expected = [f"{name} holds" in problem for problem in structure_problems(ROWS, wrong, 1)]
    assert any(expected) == (name != "residual_mass")
    short = Rows(ROWS.sequence_id, {**ROWS.lists, name: ROWS["top_ids"]})
    assert any(f": {name} holds" in problem for problem in structure_problems(short, MANIFEST, 1))
