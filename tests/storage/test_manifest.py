"""Manifests and receipts: what makes two caches the same, and that a damaged one is refused and no more."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import CacheError
from storage.files import write_json
from storage.manifest import Manifest, Receipt, read_manifest, read_receipt, write_model
from tests.storage.synthetic import make_manifest

RECEIPT = Receipt(
    cache_id="0123456789abcdef",
    shard=3,
    rows=2,
    tokens=9,
    stored_positions=7,
    entries=28,
    bytes=4096,
    sha256="a" * 64,
    tail_prior_sha256="b" * 64,
    sum_tail_mass=0.25,
    sum_unc=1.5,
    seconds=0.125,
)
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


def changed(**parts: Any) -> Manifest:
    """The usual manifest with some nested values replaced: `scoring__top_n=5`."""
    plain = make_manifest().model_dump(mode="json")
    for path, value in parts.items():
        *parents, name = path.split("__")
        place = plain
        for parent in parents:
            place = place[parent]
        place[name] = value
    return Manifest.model_validate(plain)


# ---- identity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"scoring__top_n": 5}, "scoring.top_n: 4, not 5"),
        ({"scoring__dtype": "bfloat16"}, 'scoring.dtype: "float32", not "bfloat16"'),
        ({"scoring__temperatures": [2.0]}, "scoring.temperatures: [], not [2.0]"),
        ({"scoring__seed": 7}, "scoring.seed: 0, not 7"),
        ({"teacher__name": "somebody"}, 'teacher.name: "nobody", not "somebody"'),
        ({"teacher__weights": "f" * 64}, "teacher.weights: null, not "),
        ({"tokenizer__behaviour_sha256": "9" * 64}, "tokenizer.behaviour_sha256: "),
        ({"corpus__fingerprint": "9" * 64}, "the corpus changed, by its rows"),
        ({"vocabulary_size": 301}, "vocabulary_size: 300, not 301"),
    ],
)
def test_a_difference_is_named_from_both_sides(parts: dict[str, Any], named: str) -> None:
    one, other = make_manifest(), changed(**parts)
    [difference] = one.differences(other)
    assert difference.startswith(named)
    assert len(other.differences(one)) == 1
    assert one.cache_id != other.cache_id


def test_another_plan_is_one_difference_that_names_the_option() -> None:
    [difference] = make_manifest(shard_tokens=12).differences(make_manifest(shard_tokens=9))
    assert "--shard-tokens" in difference


def test_several_differences_are_all_named() -> None:
    other = changed(scoring__top_n=5, scoring__seed=1, vocabulary_size=301)
    assert [d.partition(":")[0] for d in make_manifest().differences(other)] == [
        "scoring.seed",
        "scoring.top_n",
        "vocabulary_size",
    ]


@pytest.mark.parametrize("parts", [{"source": {"dataset": "elsewhere"}}, {"made_with": {"torch": "99"}}])
def test_where_it_came_from_is_no_difference(parts: dict[str, Any]) -> None:
    assert make_manifest().differences(changed(**parts)) == []
    assert make_manifest().cache_id == changed(**parts).cache_id


def test_long_values_are_cut_in_the_sentence() -> None:
    [difference] = make_manifest().differences(changed(teacher__name="x" * 5000))
    assert len(difference) < 200


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    manifest = make_manifest(temperatures=(0.5, 2.0), tail_samples=2, logprob_bits=32)
    write_model(tmp_path / "manifest.json", manifest)
    assert read_manifest(tmp_path / "manifest.json") == manifest
    assert read_manifest(tmp_path / "manifest.json").cache_id == manifest.cache_id
    write_model(tmp_path / "receipt.json", RECEIPT)
    assert read_receipt(tmp_path / "receipt.json") == RECEIPT


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {"shards": []},
        {"shards": [{"first": 1, "sequences": 6, "tokens": 27}]},
        {"shards": [{"first": 0, "sequences": 5, "tokens": 27}]},
        {"shards": [{"first": 0, "sequences": 3, "tokens": 14}, {"first": 2, "sequences": 3, "tokens": 13}]},
        {"scoring__top_n": 301},
        {"scoring__top_n": 0},
        {"scoring__logprob_bits": 12},
        {"scoring__temperatures": [0.0]},
        {"scoring__temperatures": [-2.0]},
        {"scoring__temperatures": [1.0]},
        {"scoring__temperatures": [float("nan")]},
        {"scoring__temperatures": [float("inf")]},
        {"scoring__temperatures": [2.0, 2.0]},
        {"scoring__temperatures": [2.0, 2.0000001]},
        {"scoring__temperatures": [1.0000001]},
        {"scoring__tail_samples": -1},
        {"vocabulary_size": 1},
        {"corpus__sequences": 0},
        {"something_else": 1},
        {"format_version": 0},
        {"format_version": 2},
        {"format_version": "2"},
        {"format_version": 2.0},
        {"format_version": True},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        changed(**parts)
    plain = make_manifest().model_dump(mode="json")
    for path, value in parts.items():
        *parents, name = path.split("__")
        place = plain
        for parent in parents:
            place = place[parent]
        place[name] = value
    write_json(tmp_path / "manifest.json", plain)
    with pytest.raises(CacheError, match=r"manifest\.json: "):
        read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("version", [2, 99, 10**30], ids=str)
def test_a_newer_version_is_told_from_damage_even_with_fields_unknown_here(tmp_path: Path, version: int) -> None:
    plain = make_manifest().model_dump(mode="json") | {"format_version": version, "sketch": {"rank": 64}}
    write_json(tmp_path / "manifest.json", plain)
    with pytest.raises(CacheError, match=f"format version {version} is newer .* upgrade"):
        read_manifest(tmp_path / "manifest.json")


OPTIONAL = {"tail_prior_sha256", "sum_sketch_kl", "sum_residual_mass"}


@pytest.mark.parametrize("missing", sorted(RECEIPT.model_dump().keys() - OPTIONAL))
def test_a_receipt_without_a_field_is_refused_with_the_field_named(tmp_path: Path, missing: str) -> None:
    plain = RECEIPT.model_dump(mode="json")
    del plain[missing]
    write_json(tmp_path / "part.json", plain)
    with pytest.raises(CacheError, match=rf"part\.json: .*{missing}"):
        read_receipt(tmp_path / "part.json")


@pytest.mark.parametrize("read", [read_manifest, read_receipt])
def test_no_file_and_no_file_but_a_folder(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(CacheError, match="there is no"):
        read(tmp_path / "file.json")
    (tmp_path / "file.json").mkdir()
    with pytest.raises(CacheError, match=r"file\.json"):
        read(tmp_path / "file.json")
    (tmp_path / "plain").touch()
    with pytest.raises(CacheError, match="plain"):
        read(tmp_path / "plain" / "file.json")


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(
        CacheError,
        match="has 68,157,440 bytes, more than the 67,108,864 that a manifest may have; set PIPELINE_JSON_BYTES",
    ):
        read_manifest(tmp_path / "manifest.json")


# ---- fuzz -------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**320)
    | st.floats()
    | st.text(st.characters(), max_size=20)  # lone surrogates included
    | st.sampled_from(["", "0" * 64, "\ud800", "../../x", "1", "nan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def only_cache_errors(path: Path, read: Callable[[Path], Any]) -> None:
    """Reading raises CacheError, or gives a model whose every use works."""
    try:
        model = read(path)
    except CacheError:
        return
    if isinstance(model, Manifest):
        assert len(model.cache_id) == 16
        assert model.differences(model) == []
        assert model.differences(make_manifest()) == [] or model.cache_id != make_manifest().cache_id
        assert len({column.name for column in model.scoring.columns}) == len(model.scoring.columns)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The way to every value inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


@pytest.mark.parametrize("what", ["manifest", "receipt"])
@FUZZ
@given(data=st.data())
def test_any_value_anywhere_is_taken_or_refused(tmp_path: Path, what: str, data: st.DataObject) -> None:
    model, read = {"manifest": (make_manifest(), read_manifest), "receipt": (RECEIPT, read_receipt)}[what]
    plain: Any = copy.deepcopy(model.model_dump(mode="json"))
    place = data.draw(st.sampled_from(places(plain)))
    value = data.draw(JSON)
    if not place:
        plain = value
    else:
        inside = plain
        for key in place[:-1]:
            inside = inside[key]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            inside[place[-1]] = value
        elif action == "remove":
            del inside[place[-1]]
        elif isinstance(inside, dict):
            inside[data.draw(NAMES)] = value
    (tmp_path / "file.json").write_text(json.dumps(plain))
    only_cache_errors(tmp_path / "file.json", read)


@pytest.mark.parametrize("what", ["manifest", "receipt"])
@FUZZ
@given(cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4))
@example(cuts=[(0.0, 3, b"")])
def test_any_bytes_are_taken_or_refused(tmp_path: Path, what: str, cuts: list[tuple[float, int, bytes]]) -> None:
    model, read = {"manifest": (make_manifest(), read_manifest), "receipt": (RECEIPT, read_receipt)}[what]
    raw = bytearray(json.dumps(model.model_dump(mode="json"), indent=2).encode())
    for share, length, new in cuts:
        at = int(share * len(raw))
        raw[at : at + length] = new
    (tmp_path / "file.json").write_bytes(raw)
    only_cache_errors(tmp_path / "file.json", read)


@FUZZ
@given(st.binary(max_size=60))
@example(b"")
@example(b"[" * 100_000)
@example(b"1" * 5000)
@example(b'{"format_version": 1e999}')
@example(b"\xef\xbb\xbf{}")
def test_garbage_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file.json").write_bytes(raw)
    for read in (read_manifest, read_receipt):
        with pytest.raises(CacheError):
            read(tmp_path / "file.json")
