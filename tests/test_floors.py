"""The floors of pyproject.toml are the versions that `make test-floors` installs, name by name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
# Not dependencies of ours: said so that pip's search for versions that go with the rest ends.
HELPERS = {"aiobotocore", "boto3", "botocore", "cfn-lint"}


def floors() -> dict[str, Version]:
    """Name -> the lowest version that pyproject.toml allows; two places that differ are an error."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, Version] = {}
    for text in [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]:
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", text
        version = Version(specifier.version)
        assert found.setdefault(requirement.name, version) == version, f"{requirement.name} has two floors"
    return found


def pinned() -> dict[str, Version]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints-floors.txt").read_text().splitlines())
    pairs = (re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)", line) for line in lines if line)
    return {pair[1]: Version(pair[2]) for pair in pairs if pair}


def test_floors_are_what_is_tested() -> None:
    ours, tested = floors(), pinned()
    assert {*ours} == {*tested} - HELPERS
    assert {name: (ours[name], tested[name]) for name in ours if ours[name] != tested[name]} == {}


def test_every_line_is_a_pin() -> None:
    lines = [line for line in (ROOT / "constraints-floors.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(pinned())
