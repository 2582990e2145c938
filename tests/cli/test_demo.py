"""The demonstration from the command line: one table, one report, and a sentence for what cannot be shown."""

import errno
import json
import os

import pytest
import torch

from regard.cli import main


@pytest.fixture
def show(model_folder, tmp_path, capsys):
    """What the verb answers: exit code, stdout, stderr."""
    from regard.papers.duo_attention import random_gates, save_gates

    gates = save_gates(random_gates(3, 2, torch.Generator().manual_seed(5), sinks=4, recent=16), tmp_path / "gates")
    defaults = ["--model", model_folder, "--gates", gates, "--report", tmp_path / "out" / "report.html"]
    sizes = ["--tokens", 200, "--passkeys", 1]

    def call(*words):
        code = main.main(["demo", *map(str, [*defaults, *sizes, *words])])
        return code, *capsys.readouterr()

    return call


def test_one_table_and_a_report(show, tmp_path):
    code, out, err = show()
    assert code == 0 and not err
    for text in ("full attention", "streaming heads", "half at random", "DuoAttention", "0 of 1", "regard run duo_"):
        assert text in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "half at random" in page


def test_rows_as_json(show):
    code, out, _ = show("--json", "--seed", 3)
    rows = json.loads(out)
    assert code == 0 and [row["way"] for row in rows][2:] == ["half at random", "DuoAttention"]
    assert rows[1]["bytes_held"] < rows[2]["bytes_held"] == rows[3]["bytes_held"] < rows[0]["bytes_held"]


def test_a_full_disk_leaves_nothing_half_written(show, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = show()
    path = tmp_path / "out" / "report.html"
    assert code == 1 and "DuoAttention" in out  # what was measured is shown all the same
    assert err == f"regard: could not write {path}: No space left on device\n"
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--passkeys", "4"], "passkeys must be from 1 to 3, got 4"),
        (["--tokens", "20"], "tokens must be at least "),
        (["--tokens", "-1"], "tokens must be at least "),
        (["--tokens", "590"], "tokens must leave room for the questions in the model's context of 600, got 590"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--gates", "nowhere"], "--gates: gates must be a folder or one of "),
        (["--gates", "smollm2-135m-instruct"], "the gates are for 30 layers x 3 KV heads, the model has 3 x 2"),
        (["--report", "."], "--report must be a file, got the folder ."),
    ],
)
def test_what_cannot_be_shown_gets_one_sentence_and_2(show, words, sentence):
    code, out, err = show(*words)
    assert code == 2 and not out
    assert err.startswith(f"regard: {sentence}") and err.count("\n") == 1
