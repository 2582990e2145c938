"""Benches are found, run and shown, whatever their rows are."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from regard.cli import bench, main


@dataclass(frozen=True)
class Options:
    """What the made-up bench accepts."""

    sizes: tuple[int, ...] = (1, 2)
    """Sizes to measure."""

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise ValueError(f"sizes must be positive, got {min(self.sizes)}")


@pytest.fixture
def made_up(monkeypatch):
    """A bench that measures nothing, in the place of the attention bench."""
    module = ModuleType("made_up_bench")
    module.MadeUp = Options

    def run_bench(options, run):
        if 13 in options.sizes:
            raise ValueError("sizes must not hold 13")
        path = run.workdir / "rows.json"
        rows = [{"kernel": f"k{size}", "size": size, "ms": size / 3, "seed": run.seed} for size in options.sizes]
        path.write_text(json.dumps(rows))
        return path

    module.bench_made_up = run_bench
    module.rows_of = lambda path: json.loads(path.read_text())
    monkeypatch.setitem(sys.modules, "made_up_bench", module)
    monkeypatch.setitem(bench.BENCHES, "attention", bench.Bench("made_up_bench", "MadeUp", "bench_made_up", "Nothing."))


def test_rows_are_shown_and_reported(made_up, tmp_path, capsys):
    assert main.main(["bench", "attention", "--sizes", "3", "9", "--seed", "5", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "k3" in out and "k9" in out and str(tmp_path / "attention" / "report.html") in out.replace("\n", "")
    assert "k9" in (tmp_path / "attention" / "report.html").read_text()


def test_rows_as_json(made_up, tmp_path, capsys):
    assert main.main(["bench", "attention", "--json", "--workdir", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"kernel": "k2", "size": 2, "ms": pytest.approx(2 / 3), "seed": 0}


@pytest.mark.parametrize(
    ("sizes", "sentence"), [("0", "sizes must be positive, got 0"), ("13", "sizes must not hold 13")]
)
def test_wrong_options_are_usage_errors(made_up, tmp_path, capsys, sizes, sentence):
    assert main.main(["bench", "attention", "--sizes", sizes, "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"regard: {sentence}\n"


def test_many_measurements_go_downwards():
    row = {"mixer": "a", **{f"m_{i}": i for i in range(bench.WIDE)}}
    headers, cells = bench.upright([row, row | {"mixer": "b"}])
    assert headers == ["mixer", "a", "b"]
    assert cells[0] == ["m 0", 0, 0] and len(cells) == bench.WIDE
    assert bench.upright([{"mixer": "a", "m": 1}]) == (["mixer", "m"], [["a", 1]])


def test_the_mixers_bench_runs_from_the_command_line(tmp_path, capsys):
    small = [
        "--only",
        "softmax",
        "--steps",
        "2",
        "--recall-steps",
        "2",
        "--lengths",
        "16",
        "32",
        "--dim",
        "32",
        "--layers",
        "1",
        "--length",
        "32",
        "--batch",
        "2",
    ]
    assert main.main(["bench", "mixers", *small, "--workdir", str(tmp_path), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["mixer"] == "softmax"
