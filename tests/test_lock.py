"""requirements.lock: everything that the package needs, in ranges that it allows, each with hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def test_the_lock_holds_what_the_package_needs() -> None:
    blocks = re.split(r"(?m)^(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())
    locked: dict[str, Version] = {}
    for block in filter(None, blocks):
        requirement = Requirement(block.partition("\\\n")[0])
        (pinned,) = requirement.specifier
        assert pinned.operator == "==", block[:80]
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block), block[:80]
        locked[requirement.name] = Version(pinned.version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["lora"], *extras["gguf"], *extras["s3"]]:
        needed = Requirement(text)
        assert locked[needed.name] in needed.specifier, text
    assert "://" not in (ROOT / "requirements.lock").read_text()
