import json
import math
import sys

import pytest
import torch
from matplotlib.figure import Figure

from regard import papers
from regard.blocks.softmax_attention import SoftmaxAttention
from regard.evidence import mixer_bench
from regard.evidence.mixer_bench import MixerBench, bench_mixers, results_of, rows_of
from regard.evidence.mixer_measurements import RecallTask, TextTask, Training, cost
from regard.paper import Run

CARD = """---
slug: toy
title: A mixer that another package offers
date: 2024-01-01
authors: 1
arxiv: null
venue: none
code: null
license: null
family: test
provides: [mixer]
summary: A convolution, and one that looks ahead.
---
# Toy
"""

ROOM = """
from regard.blocks.convolution import CausalConvolution
from regard.blocks.sequence_mixer import SequenceMixer


class LooksAhead(CausalConvolution):
    exempt = frozenset({"causality"})


MIXERS = {"toy": lambda dim: CausalConvolution(dim, 4), "toy.ahead": lambda dim: LooksAhead(dim, 4)}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A room outside of the house, and the only one that provides a mixer."""
    folder = tmp_path / "rooms" / "toy_room"
    folder.mkdir(parents=True)
    (folder / "card.md").write_text(CARD)
    (folder / "__init__.py").write_text(ROOM)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(papers, "_rooms", lambda: {"toy": papers.read_card("toy", "toy_room", folder)})
    yield folder
    sys.modules.pop("toy_room", None)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat. " * 60)
    return str(folder)


def tiny(texts: str, **options) -> MixerBench:
    return MixerBench(
        **dict(
            data=texts, steps=4, dim=8, layers=1, length=16, batch=2, recall_steps=3, recall_pairs=2, recall_length=8,
            recall_vocab=16, lengths=(16, 64),
        )
        | options
    )  # fmt: skip


def test_mixers_are_found_through_their_rooms_and_measured(toy, texts, tmp_path):
    path = bench_mixers(tiny(texts), Run(seed=0, workdir=tmp_path / "run"))
    softmax, other = results_of(path)
    assert [softmax.mixer, other.mixer] == ["softmax", "toy"]
    assert softmax.state_bytes == (2 * 16 * 8 * 4, 2 * 64 * 8 * 4)  # keys and values of every token
    assert other.state_bytes == (3 * 8 * 4, 3 * 8 * 4)
    assert [step for step, _ in other.text_curve] == [0, 1, 2, 3, 4]
    assert all(t > 0 for result in (softmax, other) for t in (*result.forward, *result.decode))
    assert abs(other.text_curve[0][1] - 8) < 1  # an untrained model knows nothing: log2(256) bits
    (_, row) = rows_of(path)
    assert row["mixer"] == "toy" and row["state_bytes_64"] == 96 and math.isfinite(row["bits_per_byte"])
    assert (tmp_path / "run" / "figures" / "mixers.png").stat().st_size > 10_000


def test_a_finished_mixer_is_measured_anew_only_after_a_change(toy, texts, tmp_path, monkeypatch):
    trained = []
    learn = TextTask.learn
    monkeypatch.setattr(mixer_bench, "draw", lambda results: Figure())
    monkeypatch.setattr(TextTask, "learn", lambda self, *a: trained.append(a[-1]) or learn(self, *a))

    def trained_by(options: MixerBench, seed: int = 0) -> list[str]:
        trained.clear()
        bench_mixers(options, Run(seed=seed, workdir=tmp_path / "run"))
        return list(trained)

    assert trained_by(tiny(texts, only=("toy",))) == ["toy"]
    assert trained_by(tiny(texts, only=("softmax", "toy"))) == ["softmax"]
    assert [row["mixer"] for row in rows_of(tmp_path / "run" / "mixers.json")] == ["softmax", "toy"]
    assert trained_by(tiny(texts, only=("toy",))) == []
    assert [row["mixer"] for row in rows_of(tmp_path / "run" / "mixers.json")] == ["toy"]
    (toy / "__init__.py").write_text(
        ROOM.replace('"toy": lambda dim: CausalConvolution(dim, 4)', '"toy": lambda dim: CausalConvolution(dim, 3)')
    )
    assert trained_by(tiny(texts)) == ["toy"]
    (toy / "__init__.py").write_text((toy / "__init__.py").read_text() + "\n# only a comment\n")
    assert trained_by(tiny(texts)) == []
    assert trained_by(tiny(texts, steps=5)) == ["softmax", "toy"]
    assert trained_by(tiny(texts, steps=5), seed=1) == ["softmax", "toy"]


def test_what_was_finished_before_an_interruption_is_kept(toy, texts, tmp_path, monkeypatch):
    draw = RecallTask.learn

    def interrupted(self, maker, dim, training, run, name):
        if name == "toy":
            raise KeyboardInterrupt
        return draw(self, maker, dim, training, run, name)

    monkeypatch.setattr(RecallTask, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_mixers(tiny(texts), Run(seed=0, workdir=tmp_path / "run"))
    assert [result.mixer for result in results_of(tmp_path / "run" / "mixers.json")] == ["softmax"]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_same_seed_gives_the_same_numbers(toy, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(mixer_bench, "draw", lambda results: Figure())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = [results_of(bench_mixers(tiny(texts), Run(seed=3, workdir=tmp_path / name))) for name in "ab"]
    assert [r.text_curve for r in runs[0]] == [r.text_curve for r in runs[1]]
    assert [r.recall_curve for r in runs[0]] == [r.recall_curve for r in runs[1]]
    assert torch.equal(torch.get_rng_state(), before)


def test_training_lowers_the_loss_on_text(tmp_path):
    run = Run(seed=0, workdir=tmp_path)
    task = TextTask.of("the cat sat on the mat. " * 60, length=32, batch=4)
    result = task.learn(lambda dim: SoftmaxAttention(dim, 2), 32, 1, Training(40, 1e-2), run, "softmax")
    assert result.curve[-1][1] < 3 < 6 < result.curve[0][1]
    assert result.parameters == 256 * 32 + 4 * 32 * 32 + 3 * 32 * 88 + 3 * 32


def test_validation_text_is_not_trained_on():
    task = TextTask.of("a" * 900 + "b" * 100, length=33, batch=1)
    assert set(task.train.tolist()) == {ord("a")} and set(task.validation.flatten().tolist()) == {ord("b")}
    assert task.validation.shape == (3, 34)


def test_state_is_measured_after_reading(tmp_path):
    measured = cost(lambda dim: SoftmaxAttention(dim, 1), 8, 5, Run(seed=0, workdir=tmp_path), repeats=1, decoded=2)
    assert measured.length == 5 and measured.state_bytes == 2 * 5 * 8 * 4


def test_a_diverging_mixer_is_named(tmp_path):
    task = TextTask.of("the cat sat on the mat. " * 60, length=32, batch=4)
    with pytest.raises(ValueError, match=r"softmax: text: no finite number at step 1; try a lower learning_rate"):
        task.learn(lambda dim: SoftmaxAttention(dim, 1), 8, 1, Training(2, math.inf), Run(0, tmp_path), "softmax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(only=("softmx",)), "no mixer 'softmx'; did you mean 'softmax'\\? \\(there are softmax, toy\\)"),
        (dict(only=("toy.ahed",)), "no mixer 'toy.ahed'; did you mean 'toy.ahead'\\?"),
        (dict(only=("toy.ahead",)), "only must name causal mixers, got 'toy.ahead', whose tokens see later ones"),
        (dict(length=2000), "data must hold at least 20020 bytes for length 2000, got 1440"),
        (dict(recall_pairs=3), "length must be even and at least 4 \\* pairs = 12, got 8"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_training(toy, texts, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench_mixers(tiny(texts, **options), Run(seed=0, workdir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps must be positive, got 0"),
        (dict(lengths=(16, -1)), r"lengths must be positive, got \(16, -1\)"),
        (dict(lengths=()), "lengths must name at least one length"),
        (dict(learning_rate=math.nan), "learning_rate must be positive, got nan"),
    ],
)
def test_options_check_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        MixerBench(**options)


def test_missing_data_are_named(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder nowhere"):
        bench_mixers(tiny("nowhere"), Run(seed=0, workdir=tmp_path))


def test_the_options_are_there_without_torch():
    import subprocess

    code = "import sys, regard.evidence.mixer_bench; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_results_are_plain_json(toy, texts, tmp_path):
    path = bench_mixers(tiny(texts, only=("toy",)), Run(seed=0, workdir=tmp_path))
    content = json.loads(path.read_text())
    assert content["settings"]["dim"] == 8 and list(content["results"]) == ["toy"]
    assert mixer_bench.results_of(path) == results_of(path)
