"""A few of each fault: what fills the table of docs/reliability.md works, and finds what is put before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import faults

FEW = "--kills 5 --calibrations 2 --seals 3 --writers 2 --full 40 --read-only 1"
FEW += " --flips 1999 --cuts 8000 --others 9 --documents 4"


def test_a_few_of_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = faults.run(tmp_path, faults.options(FEW.split()))
    assert [line.failures for line in lines if line.failures] == []
    tried = {line.fault: line.tried for line in lines}
    assert tried["SIGKILL while caching"] == 5 and tried["SIGKILL while sealing"] == 3
    assert tried["SIGKILL while calibrating the sketch"] == 2 and tried["one byte: `sketch.safetensors`"] > 1
    assert tried["one byte: `shards`"] >= 6 and tried["edited: `manifest.json`"] > 30


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    """A cache that differs from an undisturbed one is a failure, not a row of zeros."""
    site = faults.Site.make(tmp_path, faults.options(["--documents", "2"]))
    assert faults._amiss(site, site.whole, set()) == []
    assert faults._amiss(site, site.whole, {"part-00009.json"}) == ["lost part-00009.json"]
    assert any("not what an undisturbed run writes" in problem for problem in faults._amiss(site, site.other, set()))
