"""Every kind of source, every way it can be broken, and that nothing stale or half-read is served."""

import datetime
import gc
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stages import counting, sources, text_files
from stages.corpus import build_corpus
from stages.pretrained import load_tokenizer
from stages.sources import decode_columns, load_rows
from storage.errors import RunError, UserError


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def texts(rows) -> list:
    return [rows[i]["text"] for i in range(len(rows))]


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    return message


# ---- what can be read ----


def test_json_lines_keep_order_types_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one", "n": 1}\r\n\n  \n{"text": "t\xc3\xbao\\u2028", "n": "x"}\n{"m": null}'
    )
    rows = load_rows(str(path))
    assert len(rows) == 3
    assert rows[0] == {"text": "one", "n": 1}
    assert rows[1] == {"text": "túo\u2028", "n": "x"}  # mixed types stay as they are
    assert rows[2] == rows[-1] == {"m": None}
    assert rows.column_names == ("text", "n", "m")
    assert rows.origin.where(1) == f"row 2 of {path}"
    with pytest.raises(IndexError):
        rows[3]


def test_zst_is_streamed_over_frames_and_chunks(tmp_path):
    lines = [{"text": f"{i} " + "x" * random.Random(i).randrange(3000)} for i in range(2000)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = tmp_path / "a.jsonl.zst"
    half = len(data) // 2
    path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    rows = load_rows(str(path))
    assert texts(rows) == [line["text"] for line in lines]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\n [\n {"text": "a"},\n{"text": "b"}]\n',
        '{"text": "a"}\n{"text": "b"}\n',
    ],
)
def test_json_as_list_or_lines(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert texts(load_rows(str(tmp_path / "a.json"))) == ["a", "b"]


@pytest.mark.parametrize("content", ['{"text": "a"}', '{\n  "text": "a"\n}\n'])
def test_json_of_one_object(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert texts(load_rows(str(tmp_path / "a.json"))) == ["a"]


def test_txt_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    rows = load_rows(str(tmp_path / "a.txt"))
    assert texts(rows) == ["one\ntwo\n"] and rows.column_names == ("text",)


def test_parquet_with_dictionary_columns_and_widened_types(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": pa.array(["a", "b"]).dictionary_encode(), "n": [1, 2]})
    write_parquet(tmp_path / "b.parquet", {"n": [1.5], "text": pa.array(["c"], pa.large_string())})
    rows = load_rows(str(tmp_path))
    assert texts(rows) == ["a", "b", "c"] and rows[2]["n"] == 1.5
    assert rows.origin.where(2) == f"row 1 of {tmp_path}/b.parquet"
    assert decode_columns(rows.dataset[0:3], ["text"], rows.encoded) == [["a", "b", "c"]]


def test_folder_is_recursive_sorted_and_mixed(tmp_path):
    write_lines(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2", "note": 3}])
    write_parquet(tmp_path / "a.parquet", {"text": ["a"], "day": [datetime.date(2020, 1, 1)]})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "z.txt").write_text("c")
    for ignored in ("README.md", ".hidden.csv", "LICENSE", "_SUCCESS"):
        (tmp_path / ignored).write_text("ignored")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("ignored")
    rows = load_rows(str(tmp_path))
    assert texts(rows) == ["a", "b1", "b2", "c"]
    assert rows.origin.where(2) == f"row 2 of {tmp_path}/b.jsonl"
    rows.require(["text"])
    with pytest.raises(UserError, match=r"a\.parquet has no column 'note'"):
        rows.require(["note"])


def test_save_to_disk_folders(tmp_path):
    saved = datasets.Dataset.from_dict({"text": ["a", "b"]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": saved}).save_to_disk(tmp_path / "dict")
    assert texts(load_rows(str(tmp_path / "one"))) == ["a", "b"]
    assert texts(load_rows(str(tmp_path / "dict"), split="validation")) == ["a", "b"]
    assert refusal(str(tmp_path / "dict")).endswith("has no split 'train'; choose one of: validation.")
    assert "has no split 'test'" in refusal(str(tmp_path / "one"), split="test")


@pytest.mark.parametrize("limit", [1, 3, 4, 99])
def test_limit_is_over_all_files(tmp_path, limit):
    for name in "abc":
        write_lines(tmp_path / "lines" / f"{name}.jsonl", [{"text": name + "1"}, {"text": name + "2"}])
        (tmp_path / "parquet").mkdir(exist_ok=True)
        write_parquet(tmp_path / "parquet" / f"{name}.parquet", {"text": [name + "1", name + "2"]})
    expected = ["a1", "a2", "b1", "b2", "c1", "c2"][:limit]
    assert texts(load_rows(str(tmp_path / "lines"), limit=limit)) == expected
    assert texts(load_rows(str(tmp_path / "parquet"), limit=limit)) == expected


def test_limit_reads_no_further(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken')
    assert len(load_rows(str(tmp_path / "a.jsonl"), limit=1)) == 1


def test_rows_are_memory_mapped_and_their_scratch_goes_away(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 20000)
    before = pa.total_allocated_bytes()
    rows = load_rows(str(path))
    assert pa.total_allocated_bytes() - before < 1 << 20
    folder = rows.scratch.name
    assert os.path.exists(folder)
    rows.close()
    assert not os.path.exists(folder) and len(rows[19999]["text"]) == 1000  # what is mapped stays readable
    folder = load_rows(str(path)).scratch.name
    gc.collect()
    assert not os.path.exists(folder)


def test_tables_are_text_as_it_stands(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfprompt,completion,n\r\nbond,007,\r\n"
        b'"two\nlines, ""quoted""",1e5,NA\r\n\r\n t\xc3\xba ,true,null\r\n'
    )
    rows = load_rows(str(tmp_path / "a.csv"))
    assert [rows[i] for i in range(3)] == [
        {"prompt": "bond", "completion": "007", "n": ""},
        {"prompt": 'two\nlines, "quoted"', "completion": "1e5", "n": "NA"},
        {"prompt": " tú ", "completion": "true", "n": "null"},
    ]
    (tmp_path / "b.tsv").write_text('text\tn\na, "b" c\t01\n')
    assert load_rows(str(tmp_path / "b.tsv"))[0] == {"text": 'a, "b" c', "n": "01"}
    (tmp_path / "big.csv").write_text("text\n" + "word " * 40000 + "\n")
    assert len(load_rows(str(tmp_path / "big.csv"))[0]["text"]) == 200000
    (tmp_path / "c.csv").write_text("text,x,x\na,1,2\n")
    rows = load_rows(str(tmp_path / "c.csv"))
    rows.read(["text"])
    with pytest.raises(UserError, match=r"c\.csv has more than one column 'x'; rename or remove all but one"):
        rows.read(["x"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1,2\n3\n", "line 3 has 1 value where the first line names 2"),
        ('text\n"open\n', "line 2 is not a valid row (unexpected end of data)"),
        ("text\rone\rtwo\r", "line 1 is not a valid row"),
    ],
)
def test_broken_tables_name_the_line(tmp_path, content, says):
    (tmp_path / "a.csv").write_text(content)
    assert says in refusal(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": "b", "text": "c"}\n',
            'a.jsonl, line 3 has an object that gives the key "text"',
        ),
        (
            "a.jsonl",
            '{"text": "b", "te\\u0078t": "c"}',
            'a.jsonl, line 1 has an object that gives the key "text" twice',
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "role": "tool"}]}',
            'line 1 has an object that gives the key "role"',
        ),
        (
            "a.json",
            '[{"text": "a"},\n{"text": "b", "text": "c"}]',
            'a.json has an object that gives the key "text" twice',
        ),
    ],
)
def test_a_key_that_an_object_gives_twice_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    assert says in refusal(str(tmp_path / name))


def test_whole_numbers_and_others_in_two_parquet_files_stay_apart(tmp_path, tiny):
    write_parquet(tmp_path / "a.parquet", {"input_ids": pa.array([[5, 6, 7]], pa.list_(pa.int64()))})
    write_parquet(tmp_path / "b.parquet", {"input_ids": pa.array([[5.0, 6.5]], pa.list_(pa.float64()))})
    with pytest.raises(UserError, match=r"row 1 of .*b\.parquet"):
        build_corpus(str(tmp_path), load_tokenizer(str(tiny.teacher)))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_every_kind_of_text_may_be_compressed(tmp_path, packed):
    pack = gzip.compress if packed == ".gz" else zstandard.compress
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    contents = {".jsonl": lines, ".ndjson": lines, ".json": b'[{"text": "one"}, {"text": "two"}]'}
    contents |= {".csv": b"text\none\ntwo\n", ".tsv": b"text\none\ntwo\n"}
    for ending, content in contents.items():
        path = tmp_path / f"a{ending}{packed}"
        path.write_bytes(pack(content[:9]) + pack(content[9:]))
        assert texts(load_rows(str(path))) == ["one", "two"]
    (tmp_path / f"a.txt{packed}").write_bytes(pack(b"one\ntwo\n"))
    assert texts(load_rows(str(tmp_path / f"a.txt{packed}"))) == ["one\ntwo\n"]
    path = tmp_path / f"cut.json{packed}"
    path.write_bytes(pack(random.Random(0).randbytes(1000))[:-30])
    assert "breaks off: its compressed data is cut short; copy" in refusal(str(path))
    path.write_bytes(lines)
    assert "its compressed data is damaged" in refusal(str(path))


def test_zeros_at_the_end_of_gzip_are_padding(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}') + bytes(600))
    assert texts(load_rows(str(tmp_path / "a.jsonl.gz"))) == ["a"]


# ---- Parquet: only the columns that are asked for matter ----


def odd_columns() -> dict:
    return {
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "view": pa.array([[1, 2]], pa.list_view(pa.int32())),
        "large_view": pa.array([[1, 2]], pa.large_list_view(pa.int32())),
        "uuid": pa.array([b"0" * 16], pa.uuid()),
        "seconds": pa.array([3], pa.duration("s")),
        "bytes": pa.array([b"\xff"]),
        "text.a": pa.array(["no"]),
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_unused_columns_of_parquet_do_not_matter(tmp_path, mixed):
    folder = tmp_path / "data"
    folder.mkdir()
    odd = odd_columns()
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(bytes(4) + b"\1\0\0\0"), pa.py_buffer(b"\xff"))
    arrays = [pa.array(["one"]), pa.array([1]), pa.array([2]), bad, *odd.values()]
    pq.write_table(pa.Table.from_arrays(arrays, ["text", "x", "x", "bad", *odd]), folder / "a.parquet")
    write_parquet(folder / "b.parquet", {"map": ["text now"], "text": ["two"], "more": [{"k": [1]}]})
    if mixed:
        write_lines(folder / "c.jsonl", [{"text": "three"}])
    rows = load_rows(str(folder))
    rows.require(["text"])
    rows.read(["text"])
    assert decode_columns(rows.dataset[0:2], ["text"], rows.encoded) == [["one", "two"]]
    with pytest.raises(UserError, match=r"a\.parquet has more than one column 'x'"):
        rows.read(["x"])
    if not mixed:
        with pytest.raises(UserError, match=r"Column 'bad' of .*a\.parquet is damaged: Invalid UTF8"):
            rows.read(["bad"])


def test_odd_columns_of_parquet_can_be_used(tmp_path):
    pq.write_table(pa.table(odd_columns()), tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"))
    for column, value in (("map", {"a": 1}), ("view", [1, 2]), ("large_view", [1, 2]), ("text.a", "no")):
        rows.read([column])
        assert decode_columns(rows.dataset[0:1], [column], rows.encoded) == [[value]]


def test_parquet_limit_and_files_without_a_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["a1", "a2"], "n": [1, 2]})
    write_parquet(tmp_path / "b.parquet", {"text": ["b1", "b2"]})
    rows = load_rows(str(tmp_path), limit=3)
    rows.read(["text", "n"])
    assert decode_columns(rows.dataset[0:3], ["text", "n"], rows.encoded) == [["a1", "a2", "b1"], [1, 2, None]]
    assert len(rows) == 3 and rows.origin.where(2) == f"row 1 of {tmp_path}/b.parquet"


# ---- nulls that only a type put in ----

CALLS = [
    {"role": "assistant", "content": None, "calls": [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g"}]},
    {"role": "user", "content": "hi", "calls": [{"name": "f", "arguments": {"unit": "C", "city": None}}]},
]
# Without what the type of the column made of it.
CLEAN = [
    {"role": "assistant", "calls": [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g"}]},
    {"role": "user", "content": "hi", "calls": [{"name": "f", "arguments": {"unit": "C"}}]},
]


@pytest.mark.parametrize("kind", ["parquet", "saved", "mixed"])
def test_nulls_of_a_nested_type_are_removed(tmp_path, kind):
    table = [{"messages": CALLS, "note": None, "plain": "x"}]
    folder = tmp_path / "data"
    if kind == "saved":
        datasets.Dataset.from_list(table).save_to_disk(folder)
    else:
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(table), folder / "a.parquet")
    if kind == "mixed":
        write_lines(folder / "b.jsonl", [{"messages": []}])
    rows = load_rows(str(folder))
    columns = ["messages", "note"]
    rows.read(columns)
    found = decode_columns(rows.dataset[0:1], columns, rows.encoded, rows.features)
    assert found == [[CLEAN], [None]]  # a row's own null stays
    assert load_rows(str(folder))[0] == {"messages": CLEAN, "note": None, "plain": "x"}


@pytest.mark.parametrize("kind", ["jsonl", "saved", "parquet"])
def test_nulls_that_the_data_has_itself_stay(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_lines(path, [{"messages": CALLS}])
    else:
        features = datasets.Features({"messages": datasets.List(datasets.Json())})
        made = datasets.Dataset.from_dict({"messages": [CALLS]}, features=features)
        made.save_to_disk(path) if kind == "saved" else made.to_parquet(path)
    rows = load_rows(str(path))
    assert decode_columns(rows.dataset[0:1], ["messages"], rows.encoded, rows.features) == [[CALLS]]


# ---- caches ----


def test_changed_content_is_not_served_stale(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "old"}])
    stat = path.stat()
    assert texts(load_rows(str(path))) == ["old"]
    write_lines(path, [{"text": "new"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert texts(load_rows(str(path))) == ["new"]


def test_unwritable_cache_is_not_fatal_and_nothing_lies_beside_the_source(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.delenv("TMPDIR", raising=False)
    path = write_lines(tmp_path / "data" / "a.jsonl", [{"text": "a"}])
    rows = load_rows(str(path))
    assert texts(rows) == ["a"]
    assert os.listdir(path.parent) == ["a.jsonl"]
    assert sources._hub_cache(rows.scratch.name) == os.path.join(rows.scratch.name, "hub")


def test_no_scratch_at_all_and_a_full_disk(tmp_path, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_rows_of", full)
        with pytest.raises(RunError, match=r"disk under .* is full"):
            load_rows(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "makedirs", full)
        with pytest.raises(RunError, match="set TMPDIR"):
            load_rows(str(path))


# ---- what is refused ----


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/at/all", "a/b/c", "nothing.jsonl", "no thing", "~no-such-user/x"]
)
def test_missing_path(name):
    assert refusal(name) == f"There is no file or folder {name}; check the path."


def test_unknown_hub_name_offline(tmp_path):
    code = (
        "from stages.sources import load_rows\nfrom storage.errors import UserError\n"
        "try: load_rows('no-such/corpus')\nexcept UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.startswith("no-such/corpus is no file or folder here, and no data set of that name"), done
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_hub_name_config_and_split(tmp_path, monkeypatch):
    write_lines(tmp_path / "data" / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_lines(tmp_path / "data" / "test.jsonl", [{"text": "t"}])
    real, asked = datasets.load_dataset, []

    def load_dataset(name, config, split, cache_dir):
        asked.append((name, config, split))
        return real(str(tmp_path / "data"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(load_rows("owner/name:config", limit=1)) == ["a"]
    assert texts(load_rows("name", split="test")) == ["t"]
    assert asked == [("owner/name", "config", "train"), ("name", None, "test")]
    assert refusal("name", split="dev") == "The data set name has no split 'dev'; choose one of: train, test."
    assert load_rows("name").origin.where(0) == "row 1 of name"


def test_hub_config_is_asked_for(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("name").endswith("as NAME:CONFIG; choose one of: en, de.")


def test_no_rows(tmp_path):
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]")):
        (tmp_path / name).write_text(content)
        assert "has no rows" in refusal(str(tmp_path / name))
    write_parquet(tmp_path / "d.parquet", {"text": pa.array([], pa.string())})
    assert "has no rows" in refusal(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_zst_says_where(tmp_path, keep):
    text = "".join(json.dumps({"text": str(random.Random(i).random())}) + "\n" for i in range(50000)).encode()
    data = zstandard.compress(text)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(data[: int(len(data) * keep)])
    message = refusal(str(path))
    assert message.startswith(f"{path} breaks off after row ") and "cut short" in message
    assert 0 < int(message.split("after row ")[1].split(":")[0]) < 50000


def test_damaged_and_empty_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b'{"text": "not compressed"}')
    assert "after row 0: its compressed data is damaged" in refusal(str(path))
    path.write_bytes(b"")
    assert "after row 0: its compressed data is cut short" in refusal(str(path))


def test_broken_json_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    assert refusal(str(path)).startswith(f"{path}, line 3, column 9 is not valid JSON (Expecting value)")
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text" 1}]')
    assert f"{path}, line 2, column 9" in refusal(str(path))
    path.write_text('{"text": "a"}\n{')
    assert f"{path}, line 2" in refusal(str(path))
    path = tmp_path / "b.jsonl"
    path.write_text("[" * 100000)
    assert f"{path}, line 1 is not valid JSON" in refusal(str(path))


@pytest.mark.parametrize(
    ("value", "kind"),
    [("[1]", "a list"), ('"x"', "text"), ("3", "a number"), ("null", "null"), ("true", "a boolean")],
)
def test_row_that_is_no_object(tmp_path, value, kind):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + value)
    assert refusal(str(path)).startswith(f"{path}, line 2 is {kind}, not an object")
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}}, {value}]')
    assert refusal(str(path)).startswith(f"row 2 of {path} is {kind}, not an object")


def test_text_that_is_not_utf8(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": "\xff"}')
        assert f"{tmp_path / name}, line 2 is not UTF-8" in refusal(str(tmp_path / name))


def test_unknown_split_limit_ending_and_folder(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    assert refusal(str(path), split="test").startswith(f"{path} has no split 'test'; choose one of: train")
    assert len(load_rows(str(path), split="train")) == 1
    assert "limit is 0" in refusal(str(path), limit=0)
    (tmp_path / "b.xls").write_text("text\na")
    assert f"{tmp_path}/b.xls has an ending that is not supported" in refusal(str(tmp_path / "b.xls"))
    assert f"{tmp_path}/b.xls has an ending that is not supported" in refusal(str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("")
    assert "has no data files" in refusal(str(tmp_path / "empty"))


def test_parquet_that_is_broken_or_disagrees(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert f"{tmp_path}/a.parquet is not a readable Parquet file" in refusal(str(tmp_path))
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    write_parquet(tmp_path / "b.parquet", {"words": ["a"]})
    with pytest.raises(UserError, match=r"b\.parquet has no column 'text', which other files of .* have"):
        load_rows(str(tmp_path)).require(["text"])
    write_parquet(tmp_path / "b.parquet", {"text": [["a"]]})
    assert texts(load_rows(str(tmp_path))) == ["a", ["a"]]  # whoever wants text refuses the second, by its row


def test_names_that_are_not_utf8(tmp_path):
    table = write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    table.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    assert texts(load_rows(str(tmp_path))) == ["a"]
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "w") as file:
        file.write('{"text": "b"}\nbroken')
    assert "caf\udce9.jsonl, line 2" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "name of the data set is empty"),
        ("x" * 300, "cannot be read: File name too long"),
        ("dangling", "dangling is a link to nowhere, which is not there"),
        ("/dev/null", "/dev/null is a pipe or device, not a file"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    assert says in refusal(name)


def test_text_of_another_encoding_is_named(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.txt"):
        (tmp_path / name).write_bytes('text\n{"text": "a"}\n'.encode("utf-16"))
        assert "is UTF-16 or UTF-32 text; convert the file to UTF-8." in refusal(str(tmp_path / name))


def test_long_reading_says_how_far_it_is_when_piped(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(counting, "INTERVAL", 0.02)
    parse = text_files._parsed
    monkeypatch.setattr(text_files, "_parsed", lambda *given: time.sleep(0.01) or parse(*given))
    load_rows(str(write_lines(tmp_path / "a.jsonl", [{"text": "a" * 300_000}] * 10)))
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"reading: \d of 3 MB \(\d+%\), \d s", line) for line in lines), lines


def test_nothing_is_printed_when_piped(tmp_path, capfd):
    load_rows(str(write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 5000)))
    assert capfd.readouterr() == ("", "")
