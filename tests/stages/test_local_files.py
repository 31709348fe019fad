"""Folders of data: which files `load_dataset` would take, what is passed over is said, links and odd names."""

import os
import random
from pathlib import Path

import datasets.data_files
import pytest

from stages.local_files import check_apart, find_files
from stages.splits import splits_by_name
from storage.errors import UserError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')
    return folder


def found(folder: Path, split: str | None = None) -> tuple[list[str], list[str]]:
    local = find_files(folder, split)
    return [file.relative_to(folder).as_posix() for file in local.files], list(local.notes)


def refusal(folder: Path, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find_files(folder, split)
    return str(caught.value)


def test_one_split_is_used_and_the_others_are_said(tmp_path):
    fill(tmp_path, "train.jsonl", "train-2.jsonl", "validation.jsonl", "test.jsonl", "extra.jsonl")
    files, notes = found(tmp_path)
    assert files == ["train-2.jsonl", "train.jsonl"]
    assert notes == [
        "not used, of split validation: validation.jsonl",
        "not used, of split test: test.jsonl",
        "not used, of no split: extra.jsonl",
    ]
    assert found(tmp_path, "test")[0] == ["test.jsonl"]
    assert refusal(tmp_path, "dev").endswith("has no split 'dev'; choose one of: train, validation, test.")


def test_files_without_splits_are_all_train(tmp_path):
    fill(tmp_path, "a.jsonl", "b/c.jsonl", "contest.jsonl", "latest.jsonl")
    assert found(tmp_path) == (["a.jsonl", "b/c.jsonl", "contest.jsonl", "latest.jsonl"], [])


def test_splits_are_those_of_load_dataset(tmp_path):
    rand = random.Random(3)
    stems = ["train", "dev", "test", "a", "my-test", "eval_2", "Train", "contest", "training.v1", "val0", "x train"]
    parts = ["", "", "train", "test", "data", "my_val", "data2", "dev.old"]
    for case in range(40):
        names = {
            "/".join(filter(None, [rand.choice(parts), rand.choice(parts), f"{rand.choice(stems)}.jsonl"]))
            for _ in range(rand.randrange(1, 6))
        }
        if case % 8 == 0:
            names |= {"data/train-00000-of-00001.jsonl", "data/dev-00000-of-00002.jsonl"}
        folder = fill(tmp_path / str(case), *names)
        patterns = datasets.data_files.get_data_patterns(str(folder))
        theirs = {
            split: sorted({os.path.relpath(file, folder) for pattern in own for file in _resolved(pattern, folder)})
            for split, own in patterns.items()
        }
        ours = {split: sorted(files) for split, files in splits_by_name(sorted(names)).items()}
        assert ours == theirs, names


def _resolved(pattern: str, folder: Path) -> list[str]:
    try:
        return datasets.data_files.resolve_pattern(pattern, str(folder))
    except FileNotFoundError:
        return []


def test_a_card_decides_over_names(tmp_path):
    fill(tmp_path, "train.jsonl", "new/one.jsonl", "new/deep/two.jsonl", "old/three.jsonl")
    card = tmp_path / "README.md"
    card.write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: new/**\n"
        "  - split: test\n    path: [old/*.jsonl]\n---\nText\n"
    )
    assert found(tmp_path)[0] == ["new/deep/two.jsonl", "new/one.jsonl"]
    assert found(tmp_path, "test")[0] == ["old/three.jsonl"]
    card.write_text("---\nconfigs:\n- config_name: only\n  data_files: old/*\n---\n")
    assert found(tmp_path)[0] == ["old/three.jsonl"]
    card.write_text("---\nconfigs:\n- config_name: a\n  data_dir: new\n- config_name: b\n  data_dir: old\n---\n")
    assert "names several data sets (a, b); give the files or the folder of one." in refusal(tmp_path)
    card.write_text("---\nconfigs:\n- config_name: a\n  data_dir: new\n  default: true\n- config_name: b\n---\n")
    assert found(tmp_path)[0] == ["new/deep/two.jsonl", "new/one.jsonl"]
    card.write_text("No head.\n---\n{broken: [yaml\n---\n")
    assert found(tmp_path)[0] == ["train.jsonl"]


def test_a_card_is_read_as_load_dataset_reads_it(tmp_path):
    fill(tmp_path, "x1.jsonl", "xa.jsonl", "x^.jsonl")
    card = tmp_path / "README.md"

    def naming(files: str, before: str = "") -> None:
        card.write_text(f"{before}---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")

    for pattern, names in {
        "x[!0-9].jsonl": ["x^.jsonl", "xa.jsonl"],
        "x[0-9].jsonl": ["x1.jsonl"],
        "x[^1].jsonl": ["x1.jsonl", "x^.jsonl"],
        "x?.jsonl": ["x1.jsonl", "x^.jsonl", "xa.jsonl"],
    }.items():
        naming(f'"{pattern}"')
        assert found(tmp_path)[0] == names, pattern
    for before in ("\n", " \n\n", "\ufeff", "\ufeff\n"):
        naming("x1.jsonl", before)
        assert found(tmp_path)[0] == ["x1.jsonl"], repr(before)


def test_a_card_that_cannot_be_followed_is_refused(tmp_path):
    fill(tmp_path, "a.jsonl", "b.jsonl")
    card = tmp_path / "README.md"
    card.write_text("\n---\nlicense: mit\nconfigs: [a\nb: c\n---\n")
    assert refusal(tmp_path).startswith(f"{card}, line 5: the YAML between the lines of --- cannot be read (")
    card.write_text("---\n\x07\n---\n")
    assert "cannot be read (unacceptable character #x0007" in refusal(tmp_path)
    card.write_text("---\njust words\n---\n")
    assert "has no keys" in refusal(tmp_path)
    for files in ("nothere.jsonl", "[a.jsonl, nothere.jsonl]"):
        card.write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
        expected = f"{card} names data files that are not there (nothere.jsonl); mend or remove the card."
        assert refusal(tmp_path) == expected
    card.write_text('---\nconfigs:\n- config_name: default\n  data_files: "[z-a].jsonl"\n---\n')
    assert "by a pattern that cannot be read ([z-a].jsonl)" in refusal(tmp_path)


def test_only_files_about_the_data_are_passed_over_and_that_is_said(tmp_path):
    fill(tmp_path, "readmes.jsonl", "readme.jsonl", "_part-1.jsonl", "licenses.csv", "a.jsonl")
    fill(tmp_path, "README.md", "LICENSE", "_SUCCESS", ".hidden.jsonl", ".cache/x.jsonl", "__pycache__/y.jsonl")
    files, notes = found(tmp_path)
    assert files == ["_part-1.jsonl", "a.jsonl", "licenses.csv", "readme.jsonl", "readmes.jsonl"]
    assert notes == ["passed over: .cache, .hidden.jsonl, LICENSE, README.md, _SUCCESS and 1 more"]


def test_links(tmp_path):
    outside = fill(tmp_path / "outside", "far.jsonl", "sub/deep.jsonl")
    folder = fill(tmp_path / "folder", "a.jsonl", "b/c.jsonl")
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "linked").symlink_to("b")
    files, notes = found(folder)
    assert files == ["a.jsonl", "b/c.jsonl"]  # the data of no file twice
    assert notes == ["passed over, as links to files that are read: again.jsonl, linked/c.jsonl"]
    # A folder of somebody else, with a link to a file of ours.
    for link, target, file in (("far.jsonl", "far.jsonl", "far.jsonl"), ("out", "sub", "out/deep.jsonl")):
        (folder / link).symlink_to(outside / target)
        assert refusal(folder).startswith(f"{folder}/{file} is a link out of the folder, to {outside}/")
        (folder / link).unlink()
    # The folder itself, and a file that is named, may be links.
    (tmp_path / "named").symlink_to(folder)
    assert found(tmp_path / "named")[0] == ["a.jsonl", "b/c.jsonl"]
    (tmp_path / "one.jsonl").symlink_to(outside / "far.jsonl")
    assert find_files(tmp_path / "one.jsonl", None).files == (tmp_path / "one.jsonl",)
    (folder / "gone.jsonl").symlink_to("nowhere")
    assert refusal(folder) == f"{folder}/gone.jsonl is a link to nowhere, which is not there; mend or remove it."
    (folder / "gone.jsonl").unlink()
    (folder / "back").symlink_to(".")
    assert refusal(folder) == f"{folder}/back is a link back to a folder that it lies in; remove it."


def test_blobs_of_another_repository_are_outside(tmp_path):
    """As a link that only looks like one of the Hub's cache."""
    blobs = fill(tmp_path / "secrets" / "blobs", "0a1b.jsonl")
    folder = fill(tmp_path / "folder", "a.jsonl")
    (folder / "b.jsonl").symlink_to(blobs / "0a1b.jsonl")
    assert "b.jsonl is a link out of the folder" in refusal(folder)


def test_a_snapshot_of_the_hub_is_links_to_blobs(tmp_path):
    blobs = fill(tmp_path / "datasets--x" / "blobs", "0a1b", "2c3d")
    snapshot = tmp_path / "datasets--x" / "snapshots" / "f00"
    (snapshot / "data").mkdir(parents=True)
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"]
    for name, blob in zip(names, ["0a1b", "0a1b", "2c3d"], strict=True):
        (snapshot / "data" / name).symlink_to(os.path.relpath(blobs / blob, snapshot / "data"))
    # Two files of one content are two files.
    assert found(snapshot) == (
        [f"data/{name}" for name in names[:2]],
        ["not used, of split test: data/test-00000-of-00001.jsonl"],
    )


def test_what_is_no_file(tmp_path):
    folder = fill(tmp_path / "folder", "a.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    assert refusal(folder) == f"{folder}/pipe.jsonl is a pipe or device, not a file; move it out of the folder."
    assert "is a pipe or device, not a file" in refusal(folder / "pipe.jsonl")
    named = fill(tmp_path / "dir.jsonl", "a.jsonl")
    assert found(named)[0] == ["a.jsonl"]
    assert "dir.jsonl has no data files" in refusal(fill(tmp_path / "none" / "dir.jsonl", "README.md"))


@pytest.mark.parametrize(
    ("data", "output", "says"),
    [
        ("data", "data/cache", "lies inside the data set"),
        ("data", "data", "is the data set"),
        ("data", "link/cache", "lies inside the data set"),
        ("data/a.jsonl", "data", "lies inside the output"),
    ],
)
def test_output_and_data_lie_apart(tmp_path, monkeypatch, data, output, says):
    fill(tmp_path, "data/a.jsonl")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        check_apart(data, output)
    with pytest.raises(UserError, match=says):
        check_apart(data, f"file://{tmp_path}/{output}")
    for apart in ("cache", "data2/cache", "s3://bucket/data", "database"):
        check_apart(data, apart)
