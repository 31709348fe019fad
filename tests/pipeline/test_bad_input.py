"""Bad input, through the command line: one sentence, exit code 2, and nothing is written or changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from benchmarks.damage import contents
from storage.cache import Cache
from storage.errors import CacheError
from tests.conftest import Finished, Tiny, make_model, make_tokenizer
from tests.pipeline import apart

Pipeline = Callable[..., Finished]


def snapshot(*folders: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every path below the folders with its time of change and, for files, its bytes."""
    found: dict[str, tuple[int, bytes | None]] = {}
    for folder in folders:
        for path in [folder, *sorted(folder.rglob("*"))] if folder.exists() else []:
            found[str(path)] = (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return found


def one_sentence(ended: Finished, code: int, *parts: str) -> str:
    """The error that a command ended with, checked to be one line that says each of `parts`."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == code, ended
    assert len(lines) == 1, ended.err
    assert "Traceback" not in ended.err and "internal" not in lines[0], ended.err
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
    return lines[0]


@pytest.fixture
def scene(tmp_path: Path, tiny: Tiny) -> Path:
    """A folder that a test may fill with bad input; teacher and corpus lie elsewhere."""
    (tmp_path / "scene").mkdir()
    return tmp_path / "scene"


@pytest.fixture
def cached(scene: Path, cache_path: Path) -> Path:
    """A copy of the sound cache, to damage."""
    shutil.copytree(cache_path, scene / "cache")
    return scene / "cache"


@pytest.fixture
def caching(pipeline: Pipeline, tiny: Tiny, scene: Path) -> Callable[..., Finished]:
    """`cache-teacher` into scene/output, with some options replaced; it must not touch anything."""

    def call(*more: object, **options: object) -> Finished:
        given: dict[str, object] = {"teacher": tiny.teacher, "dataset": tiny.corpus, "output": scene / "output"}
        given |= {"engine": "transformers", "top_n": 8, "shard_tokens": 1500, "processes": 1} | options
        before = snapshot(scene, tiny.root)
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        ended = pipeline("cache-teacher", *words, *more)
        assert snapshot(scene, tiny.root) == before
        return ended

    return call


@pytest.fixture
def training(pipeline: Pipeline, tiny: Tiny, scene: Path) -> Callable[..., Finished]:
    """`train-student` on scene/cache into scene/output; it must not touch anything."""

    def call(*more: object, **options: object) -> Finished:
        given: dict[str, object] = {"student": tiny.student, "shards": scene / "cache", "output": scene / "output"}
        given |= {"max_steps": 1, "batch_size": 4} | options
        before = snapshot(scene, tiny.root)
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        ended = pipeline("train-student", *words, *more)
        assert snapshot(scene, tiny.root) == before
        return ended

    return call


# ---- the data set -----------------------------------------------------------------------------------------


def test_a_data_set_that_is_not_there(caching: Callable[..., Finished], scene: Path) -> None:
    one_sentence(caching(dataset=scene / "nowhere.jsonl"), 2, "nowhere.jsonl")


def test_a_name_that_is_no_data_set(caching: Callable[..., Finished]) -> None:
    one_sentence(caching(dataset="nobody/no-such-dataset"), 2, "nobody/no-such-dataset")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt", "empty.json", "empty.parquet", "empty.jsonl.zst"])
def test_an_empty_file(caching: Callable[..., Finished], scene: Path, name: str) -> None:
    (scene / name).touch()
    one_sentence(caching(dataset=scene / name), 2, name)


def test_an_empty_folder(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "folder").mkdir()
    one_sentence(caching(dataset=scene / "folder"), 2, "folder")


def test_rows_with_nothing_in_them(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n{"text": null}\n')
    one_sentence(caching("--no-append-eos", dataset=scene / "blank.jsonl"), 2, "blank.jsonl", "3 rows", "3 are empty")


def test_a_column_that_is_not_there(caching: Callable[..., Finished]) -> None:
    one_sentence(caching("--text-column", "body"), 2, "'body'", "text")


def test_no_column_that_could_be_meant(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "rows.jsonl").write_text('{"question": "why"}\n')
    one_sentence(caching(dataset=scene / "rows.jsonl"), 2, "question")


@pytest.mark.parametrize("value", ["3", "[1, 2]", '{"a": "b"}', "true"])
def test_a_row_that_is_not_text(caching: Callable[..., Finished], scene: Path, value: str) -> None:
    (scene / "rows.jsonl").write_text('{"text": "one good row"}\n' * 4 + f'{{"text": {value}}}\n')
    one_sentence(caching(dataset=scene / "rows.jsonl"), 2, "row 5", "rows.jsonl", "'text'")


def test_a_line_that_is_not_json(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "rows.jsonl").write_text('{"text": "one good row"}\n{"text": "half\n')
    one_sentence(caching(dataset=scene / "rows.jsonl"), 2, "rows.jsonl, line 2")


def test_bytes_that_are_not_utf8(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "rows.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff\xfe"}\n')
    one_sentence(caching(dataset=scene / "rows.jsonl"), 2, "rows.jsonl, line 2", "UTF-8")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_zst_that_breaks_off(caching: Callable[..., Finished], scene: Path, tiny: Tiny, share: float) -> None:
    whole = zstandard.ZstdCompressor().compress(tiny.corpus.read_bytes())
    (scene / "rows.jsonl.zst").write_bytes(whole[: int(share * len(whole))])
    one_sentence(caching(dataset=scene / "rows.jsonl.zst"), 2, "rows.jsonl.zst")


def test_a_parquet_that_breaks_off(caching: Callable[..., Finished], scene: Path, cache_path: Path) -> None:
    raw = Cache.open(cache_path).shard_path(0).read_bytes()
    (scene / "rows.parquet").write_bytes(raw[:-100])
    one_sentence(caching(dataset=scene / "rows.parquet"), 2, "rows.parquet")


# ---- the teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./nowhere", "/no/such/place"])
def test_a_teacher_that_is_not_there(caching: Callable[..., Finished], name: str) -> None:
    one_sentence(caching(teacher=name), 2, name)


def test_a_folder_that_is_no_model(caching: Callable[..., Finished], scene: Path) -> None:
    one_sentence(caching(teacher=scene), 2, "scene")


def test_a_teacher_whose_weights_are_missing(caching: Callable[..., Finished], scene: Path, tiny: Tiny) -> None:
    shutil.copytree(tiny.teacher, scene / "teacher")
    (scene / "teacher" / "model.safetensors").unlink()
    one_sentence(caching(teacher=scene / "teacher"), 2, "teacher", "weights")


def test_a_config_that_is_not_json(caching: Callable[..., Finished], scene: Path, tiny: Tiny) -> None:
    shutil.copytree(tiny.teacher, scene / "teacher")
    (scene / "teacher" / "config.json").write_text('{"model_type": "lla')
    one_sentence(caching(teacher=scene / "teacher"), 2, "teacher")


def test_a_tokenizer_that_is_damaged(caching: Callable[..., Finished], scene: Path, tiny: Tiny) -> None:
    shutil.copytree(tiny.teacher, scene / "teacher")
    (scene / "teacher" / "tokenizer.json").write_text("{}")
    one_sentence(caching(teacher=scene / "teacher"), 2, "teacher", "tokenizer")


def test_more_top_n_than_vocabulary(caching: Callable[..., Finished]) -> None:
    one_sentence(caching(top_n=510), 2, "--top-n 510", "509")


def test_longer_than_the_teacher_reads(caching: Callable[..., Finished]) -> None:
    one_sentence(caching(max_length=129), 2, "--max-length 129", "128")


# ---- the output directory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_n": 4}, "scoring.top_n: 8, not 4"),
        ({"seed": 1}, "scoring.seed: 0, not 1"),
        ({"shard_tokens": 700}, "--shard-tokens"),
        ({"limit": 5}, "the corpus changed, by its rows, the tokenizer or"),
        ({"max_length": 64}, "scoring.max_length: 128, not 64"),
        ({"logprob_bits": 32}, "scoring.logprob_bits: 16, not 32"),
        ({"dtype": "bfloat16"}, 'scoring.dtype: "float32", not "bfloat16"'),
    ],
    ids=str,
)
def test_a_directory_that_holds_another_cache(
    caching: Callable[..., Finished], cached: Path, options: dict[str, object], named: str
) -> None:
    one_sentence(caching(output=cached, **options), 2, str(cached), "another cache", named)


def test_a_directory_that_holds_the_cache_of_another_teacher(
    caching: Callable[..., Finished], cached: Path, tiny: Tiny
) -> None:
    one_sentence(caching(output=cached, teacher=tiny.student), 2, "another cache", 'teacher.name: "teacher", not')


def test_a_directory_that_holds_other_files(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "output").mkdir()
    (scene / "output" / "thesis.tex").write_text("precious")
    one_sentence(caching(), 2, "output", "thesis.tex")


def test_an_output_that_is_a_file(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "output").write_text("precious")
    one_sentence(caching(), 2, "output", "is a file")


def test_an_output_inside_a_file(caching: Callable[..., Finished], scene: Path) -> None:
    (scene / "file").write_text("precious")
    one_sentence(caching(output=scene / "file" / "cache"), 2, "file")


def test_an_output_whose_manifest_is_damaged(caching: Callable[..., Finished], cached: Path) -> None:
    (cached / "manifest.json").write_text('{"format_version": 1')
    one_sentence(caching(output=cached), 2, "manifest.json", "not JSON")


def test_an_output_of_a_newer_version(caching: Callable[..., Finished], cached: Path) -> None:
    edit(cached / "manifest.json", format_version=2)
    one_sentence(caching(output=cached), 2, "manifest.json", "version 2 is newer")


# ---- reading a cache: train-student, inspect, verify ------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_teacher(path: Path) -> None:
    plain = json.loads(path.read_text())
    plain["teacher"]["name"] = "gpt-17"
    path.write_text(json.dumps(plain))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def part(cache: Path, index: int, ending: str = "parquet") -> Path:
    return cache / "shards" / f"part-{index:05d}.{ending}"


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is done to a cache, and a word of the sentence with which each command answers; None: it may go on."""

    name: str
    do: Callable[[Path], object]
    train: str
    verify: str
    inspect: str | None
    verify_code: int = 1


DAMAGES = [
    Damage("flipped byte", lambda c: flip(part(c, 1)), "part-00001.parquet", "part-00001.parquet", None),
    Damage("missing shard", lambda c: part(c, 1).unlink(), "part-00001.parquet", "part-00001.parquet", "part-00001"),
    Damage("cut shard", lambda c: os.truncate(part(c, 1), 99), "part-00001.parquet", "part-00001.parquet", "part-0"),
    Damage("missing receipt", lambda c: part(c, 1, "json").unlink(), "unfinished, 1 of ", "part-00001.json", "unfin"),
    Damage(
        "damaged receipt",
        lambda c: part(c, 1, "json").write_text('{"cache_id": 3}'),
        "part-00001.json: the receipt is damaged",
        "part-00001.json: the receipt is damaged",
        "part-00001.json: the receipt is damaged",
    ),
    Damage(
        "swapped shards", lambda c: swap(part(c, 0), part(c, 2)), "part-00000.parquet", "part-00002.parquet", "part-000"
    ),
    Damage(
        "swapped shards and receipts",
        lambda c: (swap(part(c, 0), part(c, 2)), swap(part(c, 0, "json"), part(c, 2, "json"))),
        "part-00000.json: this receipt belongs to shard 2",
        "part-00000.json: this receipt belongs to shard 2",
        "part-00000.json: this receipt belongs to shard 2",
    ),
    Damage(
        "newer version",
        lambda c: edit(c / "manifest.json", format_version=7),
        "format version 7 is newer",
        "format version 7 is newer",
        "format version 7 is newer",
        verify_code=2,
    ),
    Damage(
        "edited manifest",
        lambda c: edit_teacher(c / "manifest.json"),
        "this receipt belongs to",
        "this receipt belongs to",
        "this receipt belongs to",
    ),
    Damage(
        "damaged manifest",
        lambda c: edit(c / "manifest.json", shards=[]),
        "the manifest is damaged at shards",
        "the manifest is damaged at shards",
        "the manifest is damaged at shards",
        verify_code=2,
    ),
    Damage(
        "no manifest",
        lambda c: (c / "manifest.json").unlink(),
        "there is no manifest here",
        "there is no manifest here",
        "there is no manifest here",
        verify_code=2,
    ),
    Damage("nothing", lambda c: shutil.rmtree(c), "no such directory", "no such directory", "no such directory", 2),
    Damage(
        "unfinished",
        lambda c: [path.unlink() for index in (3, 4) for path in (part(c, index), part(c, index, "json"))],
        "unfinished, 2 of ",
        "part-00003.json: there is no receipt",
        "unfinished, 2 of ",
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_cache_is_refused(
    pipeline: Pipeline, training: Callable[..., Finished], cached: Path, scene: Path, damage: Damage
) -> None:
    damage.do(cached)
    one_sentence(training(), 2, damage.train)
    before = snapshot(scene)
    verified = pipeline("verify", cached)
    sentence = one_sentence(verified, damage.verify_code)
    assert damage.verify in verified.out + sentence
    if damage.verify_code == 1:
        assert "problem" in sentence
    inspected = pipeline("inspect", cached)
    if damage.inspect is not None:
        one_sentence(inspected, 2, damage.inspect)
    else:
        assert "Traceback" not in inspected.err and inspected.code in (0, 2)
    assert snapshot(scene) == before


def test_the_sound_cache_is_taken_by_all_three(pipeline: Pipeline, cached: Path, scene: Path, tiny: Tiny) -> None:
    """What the refusals above are measured against."""
    before = snapshot(cached)
    assert pipeline("verify", cached).code == 0
    assert pipeline("inspect", cached).code == 0
    words = ["--student", tiny.student, "--shards", cached, "--output", scene / "output", "--max-steps", 1]
    assert pipeline("train-student", *words, "--batch-size", 4).code == 0
    assert snapshot(cached) == before


def test_verify_names_every_bad_file(pipeline: Pipeline, cached: Path) -> None:
    for index in (0, 2, 3):
        flip(part(cached, index))
    ended = pipeline("verify", cached)
    one_sentence(ended, 1, "3 problems")
    assert [f"part-0000{index}.parquet" in ended.out for index in range(4)] == [True, False, True, True]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_file_in_place_of_a_cache(pipeline: Pipeline, scene: Path, command: str) -> None:
    (scene / "cache").write_text("no cache")
    before = snapshot(scene)
    one_sentence(pipeline(command, scene / "cache"), 2, "cache")
    assert snapshot(scene) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--sequence", 10_000), "--sequence 10000"),
        (("--position", 127), "--position 127"),
        (("--sequence", -1), "--sequence"),
    ],
    ids=str,
)
def test_inspect_beyond_the_end(pipeline: Pipeline, cache_path: Path, words: tuple, named: str) -> None:
    one_sentence(pipeline("inspect", cache_path, *words), 2, named)


def test_a_column_the_cache_does_not_hold(cache_path: Path) -> None:
    cache = Cache.open(cache_path)
    with pytest.raises(CacheError, match=r"part-00000\.parquet: this cache holds no column tail_logmass_T2; it has "):
        cache.read_shard(0, ["tail_logmass_T2"])
    with pytest.raises(CacheError, match="no column tail_samples"):
        next(cache.column("loss_mask", "tail_samples"))


# ---- students that do not belong --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def strangers(tiny: Tiny) -> Path:
    """Students of other tokenizers and sizes."""
    root = tiny.root / "strangers"
    other = make_tokenizer(root / "tokenizer", seed_texts=["pack my box with five dozen liquor jugs " * 50])
    make_model(root / "other-tokenizer", other, hidden=16)
    same = shutil.copytree(tiny.student, root / "too-small")
    edit(same / "config.json", vocab_size=400)
    return root


def test_shards_of_a_different_tokenizer(training: Callable[..., Finished], cached: Path, strangers: Path) -> None:
    one_sentence(training(student=strangers / "other-tokenizer"), 2, "other-tokenizer", "tokenizer", "id ")


def test_a_student_whose_vocabulary_is_too_small(
    training: Callable[..., Finished], cached: Path, strangers: Path
) -> None:
    one_sentence(training(student=strangers / "too-small"), 2, "too-small", "vocabulary of 400", "500")
    ended = training("--init-from-config", student=strangers / "too-small" / "config.json")
    one_sentence(ended, 2, "vocabulary of 400", "500")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./nowhere"])
def test_a_student_that_is_not_there(training: Callable[..., Finished], cached: Path, name: str) -> None:
    one_sentence(training(student=name), 2, name)


def test_a_cache_whose_tokenizer_was_exchanged(
    pipeline: Pipeline, training: Callable[..., Finished], cached: Path, strangers: Path
) -> None:
    shutil.copytree(strangers / "tokenizer", cached / "tokenizer", dirs_exist_ok=True)
    one_sentence(training("--init-from-config"), 2, "tokenizer", "not the tokenizer that the manifest names")
    one_sentence(pipeline("inspect", cached), 2, "not the tokenizer that the manifest names")
    ended = pipeline("verify", cached)
    one_sentence(ended, 1)
    assert "not the tokenizer that the manifest names" in ended.out


def test_a_cache_without_its_tokenizer(training: Callable[..., Finished], cached: Path) -> None:
    shutil.rmtree(cached / "tokenizer")
    one_sentence(training("--init-from-config"), 2, "tokenizer")


# ---- options and outputs of train-student -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--trainer", "learning_rat=1"), "did you mean learning_rate?"),
        (("--trainer", "output_dir=x"), "output_dir"),
        (("--trainer", "lr_scheduler_type=upwards"), "upwards"),
        (("--trainer", "learning_rate=1", "--learning-rate", "1"), "learning_rate"),
        (("--objective", "magic"), "magic"),
        (("--eval-share", "1"), "--eval-share"),
    ],
    ids=str,
)
def test_no_such_option_or_value(
    training: Callable[..., Finished], cached: Path, words: tuple[str, ...], named: str
) -> None:
    one_sentence(training(*words), 2, named)


def test_a_share_that_leaves_nothing_to_train_on(training: Callable[..., Finished], cached: Path) -> None:
    one_sentence(training("--eval-share", "0.999"), 2, "--eval-share")


@pytest.fixture(scope="module")
def trained(tiny: Tiny, cache_path: Path) -> Path:
    """The output of a finished run, to copy."""
    from pipeline.cli import run

    output = tiny.root / "trained"
    words = ["--student", tiny.student, "--shards", cache_path, "--output", output, "--max-steps", 1]
    assert run(["train-student", *map(str, words), "--batch-size", "4"]) == 0
    return output


@pytest.fixture
def occupied(scene: Path, trained: Path) -> Path:
    return Path(shutil.copytree(trained, scene / "output"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--learning-rate", "1e-4"), "trainer"),
        (("--seed", "1"), "seed"),
        (("--objective", "kl"), "objective"),
        (("--eval-share", "0.2"), "eval_share"),
    ],
    ids=str,
)
def test_an_output_that_holds_another_run(
    training: Callable[..., Finished], cache_path: Path, occupied: Path, words: tuple[str, ...], named: str
) -> None:
    one_sentence(training(*words, shards=cache_path), 2, "output", "another run", named)


def test_an_output_of_the_same_run_is_left_alone(
    training: Callable[..., Finished], cache_path: Path, occupied: Path
) -> None:
    ended = training(shards=cache_path)
    assert ended.code == 0 and "finished already" in ended.err


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"], ids=repr)
@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_an_output_whose_own_files_are_damaged(
    training: Callable[..., Finished], cache_path: Path, occupied: Path, name: str, content: str
) -> None:
    (occupied / name).write_bytes(content.encode("latin-1"))
    one_sentence(training(shards=cache_path), 2, name)


def test_a_run_of_an_older_program_with_more_to_say(
    training: Callable[..., Finished], cache_path: Path, occupied: Path
) -> None:
    edit(occupied / "run.json", something="else")
    one_sentence(training(shards=cache_path), 2, "another run", "something")


def test_a_training_output_with_other_files(training: Callable[..., Finished], cached: Path, scene: Path) -> None:
    (scene / "output").mkdir()
    (scene / "output" / "thesis.tex").write_text("precious")
    one_sentence(training(), 2, "output", "other files")


def test_a_training_output_that_is_a_file(training: Callable[..., Finished], cached: Path, scene: Path) -> None:
    (scene / "output").write_text("precious")
    one_sentence(training(), 2, "output", "is a file")


def test_a_training_output_that_is_the_cache(training: Callable[..., Finished], cached: Path) -> None:
    one_sentence(training(output=cached), 2, f"The output {cached} is the cache")


# ---- a process of its own ---------------------------------------------------------------------------------


def test_the_process_itself_ends_with_one_sentence_and_code_2(scene: Path, tiny: Tiny, cached: Path) -> None:
    """Nothing a library prints, and no traceback from a thread, a fork or the end of the interpreter."""
    flip(part(cached, 1))
    words = ["--student", tiny.student, "--shards", cached, "--output", scene / "output"]
    before = snapshot(scene)
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "train-student", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    one_sentence(Finished(ended.returncode, ended.stdout, ended.stderr), 2, "part-00001.parquet", "sha256 differs")
    assert ended.stdout == "" and len(ended.stderr.splitlines()) == 1
    assert snapshot(scene) == before


# ---- a disk that fills up ---------------------------------------------------------------------------------


@pytest.fixture
def run_alone(tmp_path: Path) -> Callable[..., Finished]:
    """The real command in a process of its own in which no file may grow beyond `limit` bytes (0: no limit)."""

    def call(words: list[object], limit: int = 0) -> Finished:
        errors = tmp_path / "stderr"
        errors.unlink(missing_ok=True)
        child = apart.start(apart.command, [str(word) for word in words], limit, errors=str(errors))
        child.join(120)
        assert child.exitcode is not None, "it hangs"
        return Finished(child.exitcode, "", errors.read_text())

    return call


def caching_words(tiny: Tiny, output: Path, rows: int = 60) -> list[object]:
    words: list[object] = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", output]
    return [
        *words,
        "--engine",
        "transformers",
        "--top-n",
        16,
        "--shard-tokens",
        1500,
        "--processes",
        1,
        "--limit",
        rows,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Callable[[int], Path]:
    """The cache of the first rows, made in one go."""
    root = tmp_path_factory.mktemp("undisturbed")

    def make(rows: int) -> Path:
        path = root / str(rows)
        if not path.exists():
            words = [str(word) for word in caching_words(tiny, path, rows)]
            child = apart.start(apart.command, words, errors=str(root / "stderr"))
            child.join(120)
            assert child.exitcode == 0, (root / "stderr").read_text()
        return path

    return make


@pytest.mark.parametrize(
    ("limit", "rows"),
    [(60_000, 60), (30_000, 60), (10_000, 60), (10_000, 5), (100, 5)],
    ids=["a shard", "the tokens", "the text", "the copy of the tokenizer", "everything"],
)
def test_a_file_that_may_not_grow(
    run_alone: Callable[..., Finished],
    undisturbed: Callable[[int], Path],
    scene: Path,
    tiny: Tiny,
    limit: int,
    rows: int,
) -> None:
    """At `limit` bytes, what the name of the case says does not fit; all that is smaller does."""
    words = caching_words(tiny, scene / "cache", rows)
    ended = run_alone(words, limit)
    if limit == 100:
        assert ended.code == 1  # not even the sentence fits
    else:
        one_sentence(ended, 1)
    assert not list(scene.rglob(".tmp-*"))
    assert run_alone(words).code == 0
    assert contents(scene / "cache") == contents(undisturbed(rows))


def test_a_disk_that_is_full(
    run_alone: Callable[..., Finished],
    undisturbed: Callable[[int], Path],
    scene: Path,
    tiny: Tiny,
    pipeline: Pipeline,
) -> None:
    """On a tiny file system, filled by something else; then that is removed."""
    whole = undisturbed(60)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    with small_disk(scene / "disk", 3 * size + (1 << 20)) as disk:
        room = os.statvfs(disk)
        free = room.f_bavail * room.f_frsize
        (disk / "ballast").write_bytes(b"\0" * (free - size // 2))
        words = caching_words(tiny, disk / "cache")
        one_sentence(run_alone(words), 1, "no space left on device", "same command again")
        assert not list(disk.rglob(".tmp-*"))
        done = len(list((disk / "cache" / "shards").glob("*.json")))
        (disk / "ballast").unlink()
        ended = run_alone(words)
        assert ended.code == 0, ended.err
        assert done > 0 and f"{done} of " in ended.err
        assert contents(disk / "cache") == contents(whole)
        assert pipeline("verify", disk / "cache").code == 0


class small_disk:
    """A tmpfs of `size` bytes mounted at `path`; skips the test where that is not allowed."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def __enter__(self) -> Path:
        self.path.mkdir()
        try:
            command = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.path)]
            mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no tmpfs can be mounted here ({error})")
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here ({mounted.stderr.strip()})")
        return self.path

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.path)], check=False)


@pytest.fixture(autouse=True)
def _one_tokenizer_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
