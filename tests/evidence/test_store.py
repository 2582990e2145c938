"""What was measured, kept whole, finite and readable."""

import errno
import json
import os
from dataclasses import replace

import pytest

from regard.data.files import write_atomically
from regard.evidence import store
from regard.evidence.store import CorruptEvidence, Evidence, SeedResult

EVIDENCE = Evidence(
    claim="visits",
    statement="s",
    published="p",
    baseline="b",
    holds=True,
    results=(SeedResult(0, {"a": 1.0, "b": 2.5}, 0.1), SeedResult(1, {"a": 3.0, "b": 2.5}, 0.2)),
    recorded_at="2026-01-02T03:04:05+00:00",
    device="cpu",
    versions={"python": "3.11.0"},
    code={"m": "abc"},
)


def test_what_is_written_is_read_back(house):
    paper = house.add("stored")
    assert store.read(paper) == []
    path = store.write(paper, [EVIDENCE], claims=["visits"])
    assert path == paper.folder / "evidence.json"
    assert store.read(paper) == [EVIDENCE]
    content = json.loads(path.read_text())
    assert content["claims"]["visits"]["measured"] == {"a": 2.0, "b": 2.5}


def test_other_claims_stay_while_the_paper_makes_them(house):
    paper = house.add("merged")
    store.write(paper, [EVIDENCE, replace(EVIDENCE, claim="old")], claims=["visits", "old"])
    store.write(paper, [replace(EVIDENCE, claim="new", holds=False)], claims=["visits", "new"])
    assert {e.claim: e.holds for e in store.read(paper)} == {"visits": True, "new": False}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_is_not_finite_gets_in(house, value):
    paper = house.add("finite")
    bad = replace(EVIDENCE, results=(SeedResult(0, {"a": 1.0}, 0.1), SeedResult(1, {"a": value}, 0.1)))
    with pytest.raises(ValueError, match=r"claim 'visits', seed 1: 'a' must be a finite number, got"):
        store.write(paper, [bad], claims=["visits"])
    assert not store.evidence_path(paper).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b'{"claims": []}',
        b'{"claims": {"visits": {}}}',
        b'{"claims": {"visits": 3}}',
        b'{"claims": {"visits": {"measured": {"a": NaN}, "seeds": []}}}',
    ],
)
def test_a_corrupted_file_is_named_in_one_sentence(house, content):
    paper = house.add("corrupt")
    store.evidence_path(paper).write_bytes(content)
    with pytest.raises(CorruptEvidence) as caught:
        store.read(paper)
    assert str(paper.folder / "evidence.json") in str(caught.value)
    assert "restore it or delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused_or_read_never_half_read(house):
    paper = house.add("cut")
    path = store.write(paper, [EVIDENCE], claims=["visits"])
    whole = path.read_text()
    for length in range(len(whole.rstrip())):
        path.write_text(whole[:length])
        with pytest.raises(CorruptEvidence):
            store.read(paper)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*report\.html: No space left on device"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
