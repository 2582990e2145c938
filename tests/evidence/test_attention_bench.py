import json
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from regard.cli import main
from regard.evidence import attention_bench
from regard.evidence.attention_bench import WAYS, AttentionBench, bench_attention, rows_of, ways_at
from regard.paper import Run


def tiny(**options) -> AttentionBench:
    return AttentionBench(**dict(lengths=(8, 16), heads=2, dim=4, window=3, feature_dim=2, rounds=2) | options)


@pytest.fixture
def measured(monkeypatch):
    """The lengths that are measured from here on, in order; no pictures are drawn."""
    lengths = []
    measure = attention_bench._measured
    monkeypatch.setattr(attention_bench, "_measured", lambda o, n, run: lengths.append(n) or measure(o, n, run))
    monkeypatch.setattr(attention_bench, "draw", lambda path: Figure())
    return lengths


def test_every_way_is_measured_at_every_length(tmp_path):
    path = bench_attention(tiny(backward=True), Run(seed=0, workdir=tmp_path))
    rows = rows_of(path)
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert list(row) == [
            "way",
            *("ms_8", "ms_16", "times_faster"),
            *("with_backward_ms_8", "with_backward_ms_16", "with_backward_times_faster"),
        ]
        assert all(value > 0 for name, value in row.items() if name != "way")
    assert rows[0]["times_faster"] == rows[0]["with_backward_times_faster"] == 1
    assert (tmp_path / "figures" / "attention.png").stat().st_size > 10_000


def test_ways_of_the_same_attention_agree_and_none_sees_later_tokens():
    options = tiny(window=50)
    q, k, v = (torch.randn(1, 2, 700, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    ways = ways_at(options, 700, "cpu")
    outs = {name: way(q, k, v) for name, way in ways.items()}
    torch.testing.assert_close(outs["attend"], outs["sdpa"])
    torch.testing.assert_close(outs["attend_window"], outs["sdpa_window"])
    assert not torch.allclose(outs["sdpa"], outs["sdpa_window"])
    for tensor in (k, v):
        tensor[:, :, 600:] = 9.0
    for name, way in ways.items():
        torch.testing.assert_close(way(q, k, v)[:, :, :600], outs[name][:, :, :600])


def test_what_was_measured_is_not_measured_again(measured, tmp_path, monkeypatch):
    def measured_by(options: AttentionBench, seed: int = 0) -> list[int]:
        measured.clear()
        bench_attention(options, Run(seed=seed, workdir=tmp_path))
        return list(measured)

    path = tmp_path / "attention.json"
    two = ("sdpa", "attend")
    assert measured_by(tiny(only=two)) == [8, 16]
    before = json.loads(path.read_text())["results"]
    assert measured_by(tiny(only=two, lengths=(16, 32))) == [32]
    assert json.loads(path.read_text())["results"].items() >= before.items()
    assert list(rows_of(path)[0]) == ["way", "ms_16", "ms_32", "times_faster"]
    assert measured_by(tiny(only=("attend",))) == []
    assert [row["way"] for row in rows_of(path)] == ["attend"]
    assert measured_by(tiny(only=("attend", "linear"), lengths=(8,))) == [8]  # together, or not comparable
    assert measured_by(tiny(only=("attend",), rounds=3)) == [8, 16]
    assert measured_by(tiny(only=("attend",), rounds=3), seed=1) == [8, 16]
    assert measured_by(tiny(only=("attend",), rounds=3), seed=1) == []
    monkeypatch.setattr(attention_bench, "_code", lambda: "changed")
    assert measured_by(tiny(only=("attend",), rounds=3), seed=1) == [8, 16]


def test_what_was_finished_before_an_interruption_is_kept(measured, tmp_path, monkeypatch):
    counted = attention_bench._measured

    def interrupted(options, tokens, run):
        if tokens == 16:
            raise KeyboardInterrupt
        return counted(options, tokens, run)

    run, options = Run(seed=0, workdir=tmp_path), tiny(only=("sdpa",))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attention_bench, "_measured", interrupted)
        bench_attention(options, run)
    assert list(rows_of(tmp_path / "attention.json")[0]) == ["way", "ms_8", "times_faster"]
    assert not list(tmp_path.glob(".*"))
    bench_attention(options, run)
    assert measured == [8, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=()), "lengths must name at least one length, got none"),
        (dict(lengths=(8, 0)), r"lengths must be positive, got \(8, 0\)"),
        (dict(rounds=0), "rounds must be positive, got 0"),
        (dict(heads=-1), "heads must be positive, got -1"),
        (dict(feature_dim=5), "feature_dim must be at most dim, got 5 of 4"),
        (dict(only=("atend",)), r"no way of attention 'atend'; did you mean 'attend'\? \(there are sdpa, attend, "),
        (dict(only=("zzz",)), r"no way of attention 'zzz' \(there are"),
    ],
)
def test_options_check_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_the_bench_runs_from_the_command_line(tmp_path, capsys):
    words = "bench attention --only attend linear --lengths 8 16 --heads 2 --dim 16 --rounds 1 --backward --json"
    assert main.main([*words.split(), "--workdir", str(tmp_path)]) == 0
    attend, linear = json.loads(capsys.readouterr().out)
    assert (attend["way"], linear["way"]) == ("attend", "linear")
    assert attend["with_backward_ms_16"] > 0
    assert (tmp_path / "attention" / "report.html").exists()
    assert main.main(["bench", "attention", "--window", "0", "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "regard: window must be positive, got 0\n"


def test_the_options_are_there_without_torch():
    code = "import sys, regard.evidence.attention_bench; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
