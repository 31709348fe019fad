"""A cache that somebody made to do harm, checksums and all: one sentence, in bounded memory, and nothing executed.

Every input goes the whole way of a reader: `verify`, and all that `train-student` reads before and while it trains.
FUZZ_EXAMPLES=2000 makes the search larger and random; by default it is small and always the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.cached_tail import make_tail
from stages.held_out import split_held_out
from stages.identity import tokenizer_identity
from stages.objective import Objective
from stages.pretrained import load_tokenizer
from stages.shard_dataset import ShardDataset, corpus_threshold, sequence_lengths
from stages.student import open_caches
from stages.summary import summarize
from storage.bundle import bundle, unbundle
from storage.cache import Cache
from storage.errors import CacheError, UserError
from storage.integrity import problems
from tests.conftest import Tiny
from tests.storage.synthetic import make_manifest, make_sketch, sketch_options, write_cache

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
settings.register_profile(
    "hostile",
    max_examples=int(EXAMPLES or 30),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)
HOSTILE = settings.get_profile("hostile")
MANIFEST = make_manifest(vocabulary=40, top_n=6, tail_samples=2, shard_tokens=14)
# More than any cache of a few kilobytes may take.
MOST_BYTES = 16 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache, and a bundle of it; nothing in it may change."""
    path = tmp_path_factory.mktemp("sound") / "cache"
    cache = write_cache(path, MANIFEST)
    cache.write_tokenizer(lambda folder: (folder / "tokenizer.json").write_text("{}"))
    bundle(cache, path.with_name("cache.tar.zst"))
    return path


@contextmanager
def copied(sound: Path) -> Iterator[Path]:
    """A copy beside which nothing may appear and that may not grow."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(sound, Path(folder) / "cache")
        yield Path(folder) / "cache"
        assert [path.name for path in Path(folder).iterdir()] == ["cache"]


def use(path: Path) -> list[str]:
    """What a reader says of a cache; raises whatever is no error of ours."""
    said: list[str] = []
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    try:
        said += problems(Cache.open(path))
    except UserError as error:
        said.append(str(error))
    try:
        [cache] = open_caches([str(path)], "off")
        summarize(cache)
        make_tail(Objective(name="kl", tail="prior"), [cache])
        sequence_lengths(cache)
        train, held_out = split_held_out(cache, 0.3)
        corpus_threshold([(cache, train)], 0.5)
        for ids in (train, held_out):
            dataset = ShardDataset(cache, ids, extra=("tail_samples", "entropy"), checksums="off")
            for index in range(len(dataset)):
                dataset[index]
    except UserError as error:
        said.append(str(error))
    assert all(sentence and "\n" not in sentence for sentence in said)
    assert pool.bytes_allocated() - before < MOST_BYTES
    return said


# ---- JSON -------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "\0", 2**31, 2**63, 10**4000, 1e308, float("inf")])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner))
JSON_FILES = ("manifest.json", "shards/part-00000.json", "tail_prior.json", "partial.json")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for key, item in items:
        yield from leaves(item, (*path, key))


@given(st.sampled_from(JSON_FILES), st.data())
@HOSTILE
def test_any_value_in_any_place_of_any_json_file(sound: Path, name: str, data: st.DataObject) -> None:
    plain = json.loads((sound / name).read_bytes()) if (sound / name).exists() else {"shards": [0]}
    path = data.draw(st.sampled_from(list(leaves(plain))))
    value = data.draw(VALUES)
    at = plain
    for key in path[:-1]:
        at = at[key]
    if path:
        at[path[-1]] = value
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(plain if path else value)
    finally:
        sys.set_int_max_str_digits(4300)
    with copied(sound) as cache:
        (cache / name).write_text(text)
        use(cache)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, '{"shards": [' + "9" * 10**5 + "]}", "\ufeff{}", '{"a": "\\ud800"}', "NaN", "\0"],
    ids=["deep lists", "deep objects", "a long number", "a mark", "half a character", "NaN", "a zero byte"],
)
def test_json_that_is_made_to_break_readers(sound: Path, name: str, text: str) -> None:
    with copied(sound) as cache:
        (cache / name).write_text(text)
        assert use(cache)


# ---- Parquet ----------------------------------------------------------------------------------------------


def forge(cache: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a Parquet file, and make its receipt say so."""
    (cache / name).write_bytes(data)
    beside = {"shards": name.replace(".parquet", ".json"), "tail_sums": name.replace("tail_sums", "shards")}
    receipt = cache / beside.get(name.partition("/")[0], name).replace(".parquet", ".json")
    plain = json.loads(receipt.read_bytes())
    plain["tail_prior_sha256" if name.startswith("tail_sums") else "sha256"] = hashlib.sha256(data).hexdigest()
    if name.startswith("shards"):
        plain["bytes"] = len(data)
    receipt.write_text(json.dumps(plain))


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4
)


def changed(raw: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """Each change puts some bytes in the place of some others."""
    for where, length, new in changes:
        at = int(where * len(raw))
        raw = raw[:at] + new + raw[at + length :]
    return raw


@given(st.sampled_from(["shards/part-00001.parquet", "tail_prior.parquet"]), st.booleans(), CHANGES)
@settings(HOSTILE, max_examples=2 * HOSTILE.max_examples)
def test_any_parquet_behind_right_checksums(sound: Path, name: str, footer: bool, changes: list[Any]) -> None:
    """Half of them in the footer, which no CRC covers."""
    raw = (sound / name).read_bytes()
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little") if footer else 0
    tail = changed(raw[start:-8], changes)
    with copied(sound) as cache:
        forge(cache, name, raw[:start] + tail + len(tail).to_bytes(4, "little") + raw[-4:] if footer else tail)
        use(cache)


def big(sound: Path, values: int, **options: Any) -> tuple[bytes, pq.ColumnChunkMetaData]:
    """Shard 1, true to the format but for `values` zeros as ids of its first row, and what its footer says of them."""
    path = sound / "shards" / "part-00001.parquet"
    whole = pq.read_table(path)
    rows = len(whole)
    offsets = np.cumsum([0, values - rows + 1, *[1] * (rows - 1)]).astype(np.int32)
    at = whole.schema.get_field_index("input_ids")
    field = whole.schema.field(at)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(values, np.int32)), type=field.type)
    sink = BytesIO()
    given = {"compression": "zstd", "use_dictionary": False, "store_schema": True, **options}
    pq.write_table(whole.set_column(at, field, lists), sink, **given)
    row_group = pq.read_metadata(sink).row_group(0)
    chunks = [row_group.column(index) for index in range(row_group.num_columns)]
    return sink.getvalue(), next(chunk for chunk in chunks if chunk.path_in_schema.startswith("input_ids"))


def varint(number: int, width: int = 0) -> bytes:
    """A positive Thrift integer, zigzag, in at least `width` bytes."""
    number, digits = 2 * number, []
    while number >= 128 or len(digits) + 1 < width:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def lying(raw: bytes, *replaced: tuple[int, int]) -> bytes:
    """A Parquet file whose footer says other numbers."""
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    footer = raw[start:-8]
    for true, false in replaced:
        assert varint(true) in footer
        footer = footer.replace(varint(true), varint(false, len(varint(true))))
    return raw[:start] + footer + raw[-8:]


@contextmanager
def counted() -> Iterator[pa.MemoryPool]:
    """What Arrow allocates meanwhile."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(usual)


VALUES_OF_A_BOMB = 1 << 24
ONE_PAGE = {"data_page_size": 1 << 30, "max_rows_per_page": 1 << 30}


@pytest.mark.parametrize("honest", [True, False], ids=["the footer says so", "the footer lies"])
@pytest.mark.parametrize("options", [{}, ONE_PAGE, {"use_dictionary": True}], ids=["pages", "one page", "dictionary"])
def test_a_few_kilobytes_that_stand_for_gigabytes(sound: Path, honest: bool, options: dict[str, Any]) -> None:
    """Here for 64 MiB. Where the footer lies, Arrow alone unpacks all of it or ends the process."""
    raw, chunk = big(sound, VALUES_OF_A_BOMB, **options)
    assert len(raw) < 1 << 18
    if not honest:
        raw = lying(raw, (chunk.num_values, 9), (chunk.total_uncompressed_size, 100))
    with copied(sound) as cache, counted() as pool:
        forge(cache, "shards/part-00001.parquet", raw)
        said = use(cache)
        assert pool.max_memory() < MOST_BYTES
    assert any("part-00001.parquet" in sentence and "column" in sentence for sentence in said), said


def test_a_tail_prior_of_far_more_ids(sound: Path) -> None:
    sink = BytesIO()
    pq.write_table(pa.table({"tail_prior": np.zeros(VALUES_OF_A_BOMB, np.float32)}), sink, compression="zstd")
    with copied(sound) as cache, counted() as pool:
        forge(cache, "tail_prior.parquet", sink.getvalue())
        said = use(cache)
        assert pool.max_memory() < MOST_BYTES
    assert any("tail_prior.parquet: not 40 non-negative" in sentence for sentence in said)


# ---- sketches ---------------------------------------------------------------------------------------------

SKETCH = make_sketch(vocabulary=40)
RAW = SKETCH.to_bytes()
HEADER = json.loads(RAW[8 : 8 + int.from_bytes(RAW[:8], "little")])


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sketched") / "cache"
    cache = write_cache(path, make_manifest(vocabulary=40, top_n=6, sketch=sketch_options(SKETCH)), sketch=SKETCH)
    cache.write_tokenizer(lambda folder: (folder / "tokenizer.json").write_text("{}"))
    return path


def use_sketch(sketched: Path, data: bytes) -> list[str]:
    """What is said of a cache whose manifest names this sketch; one that is taken gives finite logits."""
    with copied(sketched) as path:
        (path / "sketch.safetensors").write_bytes(data)
        plain = json.loads((path / "manifest.json").read_bytes())
        plain["scoring"]["sketch"]["sha256"] = hashlib.sha256(data).hexdigest()
        (path / "manifest.json").write_text(json.dumps(plain))
        tracemalloc.start()
        try:
            cache = Cache.open(path)
            # The shards are of the cache that it was.
            if said := [sentence for sentence in problems(cache) if "sketch.safetensors: " in sentence]:
                with pytest.raises(CacheError) as caught:
                    make_tail(Objective(name="kl", tail="sketch"), [cache])
                assert "\n" not in str(caught.value) and any(str(caught.value) in sentence for sentence in said)
                return said
            tail = make_tail(Objective(name="kl", tail="sketch"), [cache])
            none = torch.zeros((2, 1), dtype=torch.int64)
            shares = tail.sketch_logits(torch.tensor([[1] * 3, [255] * 3], dtype=torch.uint8), none, none, 40).softmax(
                1
            )
            assert shares.isfinite().all()
            return []
        finally:
            assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
            tracemalloc.stop()


@given(st.booleans(), CHANGES)
@settings(HOSTILE, max_examples=3 * HOSTILE.max_examples)
def test_any_sketch_behind_a_right_checksum(sketched: Path, header: bool, changes: list[Any]) -> None:
    """Half of them in the header, whose length is made right."""
    end = 8 + int.from_bytes(RAW[:8], "little")
    if header:
        text = changed(RAW[8:end], changes)
        use_sketch(sketched, len(text).to_bytes(8, "little") + text + RAW[end:])
    else:
        use_sketch(sketched, changed(RAW, changes))


@given(st.data())
@HOSTILE
def test_any_value_in_any_place_of_a_sketch_s_header(sketched: Path, data: st.DataObject) -> None:
    """Shapes, types and offsets; and what it says about itself, JSON in a string of JSON."""
    plain = json.loads(json.dumps(HEADER))
    about = json.loads(plain["__metadata__"]["teacher_logit_cache.sketch"])
    of_about = data.draw(st.booleans())
    at = whole = about if of_about else plain
    path = data.draw(st.sampled_from([path for path in leaves(whole) if path]))
    for key in path[:-1]:
        at = at[key]
    sys.set_int_max_str_digits(0)
    try:
        at[path[-1]] = data.draw(VALUES)
        if of_about:
            plain["__metadata__"]["teacher_logit_cache.sketch"] = json.dumps(about)
        text = json.dumps(plain).encode()
    finally:
        sys.set_int_max_str_digits(4300)
    use_sketch(sketched, len(text).to_bytes(8, "little") + text + RAW[8 + int.from_bytes(RAW[:8], "little") :])


@pytest.mark.parametrize(
    "change",
    [
        {"basis": {"shape": [1 << 40, 3], "data_offsets": [0, 3 << 41]}},
        {"basis": {"shape": [1 << 63, 1 << 63]}},
        {"basis": {"shape": [-40, -3]}},
        {"bias": {"data_offsets": [-160, 0]}},
        {"bias": HEADER["mean"]},
        {"bias": {"data_offsets": HEADER["basis"]["data_offsets"]}},
        {"bias": {"dtype": "F8_E4M3"}},
        {"bias": {"dtype": "BF16", "shape": [80]}},
        {"more": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"__metadata__": {"teacher_logit_cache.sketch": 7}},
        {"__metadata__": None},
    ],
    ids=lambda change: str(change)[:60],
)
def test_headers_that_are_made_to_break_readers(sketched: Path, change: dict[str, Any]) -> None:
    plain = {name: {**HEADER.get(name, {}), **value} if value else value for name, value in change.items()}
    text = json.dumps({**HEADER, **plain}).encode()
    assert use_sketch(sketched, len(text).to_bytes(8, "little") + text + RAW[8 + int.from_bytes(RAW[:8], "little") :])
    assert use_sketch(sketched, (1 << 62).to_bytes(8, "little") + RAW[8:])
    assert use_sketch(sketched, RAW[:8])
    assert not use_sketch(sketched, RAW)


# ---- bundles ----------------------------------------------------------------------------------------------


@given(st.booleans(), CHANGES)
@HOSTILE
def test_any_bundle(sound: Path, plain: bool, changes: list[Any]) -> None:
    """Without its checksum; changed in the tar that is in it, or in what is carried."""
    raw = sound.with_name("cache.tar.zst").read_bytes()
    if plain:
        raw = zstandard.compress(changed(zstandard.ZstdDecompressor().stream_reader(raw).read(), changes))
    else:
        raw = changed(raw, changes)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar.zst").write_bytes(raw)
        try:
            cache = unbundle(Path(folder) / "a.tar.zst", Path(folder) / "back")
        except UserError:
            assert [path.name for path in Path(folder).iterdir()] == ["a.tar.zst"]
        else:
            assert cache.path == Path(folder) / "back"
            assert sorted(path.name for path in Path(folder).iterdir()) == ["a.tar.zst", "back"]
            use(Path(folder) / "back")


# ---- nothing is executed ----------------------------------------------------------------------------------

WATCH = """
import os, sys, tempfile, warnings
from pathlib import Path

# Of the process that tries the tokenizer, too.
told = tempfile.TemporaryFile()
HARM = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")

def watch(event, arguments):
    if event.startswith(HARM) and armed:
        os.write(told.fileno(), (str((event, str(arguments)[:100])) + "\\n").encode())

armed = False
sys.addaudithook(watch)
import jinja2
import transformers.models.auto.tokenization_auto
from pipeline.cli import run
from stages.student import StudentOptions, prepare
from storage.errors import UserError

# Jinja compiles a template before it renders it.
def compiled(*given, **named):
    os.write(told.fileno(), b"a template is compiled")
    raise RuntimeError("a template is compiled")

jinja2.Environment.compile = compiled
path, student, output = sys.argv[1:]
armed = True
for words in (["verify", path], ["inspect", path], ["inspect", path, "--sequence", "0"]):
    run(words)
try:
    prepare(StudentOptions(student, path, output))
except UserError as error:
    print(error)
armed = False
seen = os.pread(told.fileno(), 10000, 0)
assert not seen, seen
assert not Path(path, "ran").exists()
"""


def test_nothing_in_a_cache_is_executed(cache_path: Path, tiny: Tiny, tmp_path: Path) -> None:
    """A chat template that calls, code that `auto_map` names, a pickle: nothing runs, no template is rendered."""
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    mark = cache / "ran"
    evil = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    tokenizer = cache / "tokenizer"
    for name in ("evil.py", "tokenization_evil.py", "__init__.py", "conftest.py"):
        (tokenizer / name).write_text(evil)
    (tokenizer / "vocab.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "chat_template": template}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    # By the hand that made the cache: the manifest names the template.
    found = tokenizer_identity(load_tokenizer(str(tokenizer)))
    assert found.chat_template_sha256 == hashlib.sha256(json.dumps(template).encode()).hexdigest()
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["tokenizer"] = found.model_dump()
    (cache / "manifest.json").write_text(json.dumps(manifest))
    words = [sys.executable, "-c", WATCH, str(cache), str(tiny.student), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()
