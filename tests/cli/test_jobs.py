"""The jobs of a room: run by verb and stage, with options from flags and YAML, and a record of them beside the run."""

import json

import pytest
import yaml

from regard.cli import main

JOBS = '''
"""What can be run."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from regard.paper import Run


@dataclass(frozen=True)
class Size:
    """How much."""

    steps: int = 3
    """Steps to take."""
    rate: float = 0.5
    """How far each goes."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Train:
    """Walks.

    And says how far.
    """

    size: Size = field(default_factory=lambda: Size(steps=7))
    then: str = "stop"
    """What to do in the end."""

    def run(self, run: Run) -> Path:
        steps = sum(1 for _ in run.progress(range(self.size.steps), "walking"))
        if self.then == "refuse":
            raise ValueError("the ground is wet")
        if self.then == "wait":
            raise KeyboardInterrupt
        path = run.workdir / "walk.json"
        drawn = str([random.random(), torch.rand(()).item()])
        path.write_text(json.dumps(dict(steps=steps, way=steps * self.size.rate, seed=run.seed, drawn=drawn)))
        return path


@dataclass(frozen=True)
class Apply:
    """Applies it."""

    input: Path
    """A file of yours."""

    def run(self, run: Run) -> Path:
        path = run.workdir / "out.txt"
        path.write_text(self.input.read_text().upper())
        return path


JOBS = {"train": Train, "train teacher": Train, "predict": Apply}
'''


@pytest.fixture
def walk(house, tmp_path, monkeypatch, capsys):
    """What a verb on the room `walker` answers: exit code, stdout, stderr."""
    house.add("walker", jobs=JOBS)
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def test_a_job_runs_and_its_options_are_kept_beside_it(walk, tmp_path):
    code, out, _ = walk("train", "walker", "--size.rate", "1.5", "--seed", "4")
    assert code == 0 and out.endswith("Written: runs/walker/walk.json\n")
    assert "steps  7\n" in out and "way    10.5\n" in out
    kept = yaml.safe_load((tmp_path / "runs" / "walker" / "config.yaml").read_text())
    assert kept == {"size": {"steps": 7, "rate": 1.5}, "then": "stop", "seed": 4, "device": "cpu"}


def test_the_options_that_were_kept_give_the_same_again(walk, tmp_path):
    _, first, _ = walk("train", "walker", "--size.steps", "5", "--seed", "4", "--workdir", "one")
    _, again, _ = walk("train", "walker", "--config", "one/config.yaml", "--workdir", "two")
    assert again == first.replace("one/", "two/")
    assert (tmp_path / "two" / "config.yaml").read_text() == (tmp_path / "one" / "config.yaml").read_text()
    _, other, _ = walk("train", "walker", "--config=one/config.yaml", "--workdir", "three", "--seed", "5")
    assert other.count("\n") == first.count("\n") and "seed   5\n" in other and "steps  5\n" in other
    assert other.splitlines()[3] != first.splitlines()[3]


def test_stages_and_other_verbs_do_not_replace_the_record_of_training(walk, tmp_path):
    (tmp_path / "in.txt").write_text("mine")
    assert walk("train", "walker", "--seed", "1")[0] == 0
    assert walk("train", "walker", "teacher", "--seed", "2")[0] == 0
    code, out, _ = walk("predict", "walker", "--input", "in.txt", "--seed", "3")
    assert code == 0 and out == "Written: runs/walker/out.txt\n"
    folder = tmp_path / "runs" / "walker"
    assert (folder / "out.txt").read_text() == "MINE"
    seeds = {path.name: yaml.safe_load(path.read_text())["seed"] for path in folder.glob("*.yaml")}
    assert seeds == {"config.yaml": 1, "config-train-teacher.yaml": 2, "config-predict.yaml": 3}
    assert walk("predict", "walker", "--config", "runs/walker/config-predict.yaml")[0] == 0


def test_a_run_that_is_refused_leaves_the_record_of_the_one_before(walk, tmp_path):
    path = tmp_path / "runs" / "walker" / "config.yaml"
    assert walk("train", "walker")[0] == 0
    before = path.read_text()
    code, _, err = walk("train", "walker", "--then", "refuse")
    assert (code, err) == (1, "regard: the ground is wet\n")
    assert path.read_text() == before
    code, _, err = walk("train", "walker", "--then", "wait")
    assert (code, err) == (130, "regard: interrupted; what was finished is kept in runs/walker\n")
    assert "wait" in path.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "regard train needs a paper first: regard train SLUG (regard train --help lists them)"),
        (["train", "--seed", "1", "walker"], "regard train needs a paper first"),
        (["train", "walkre"], "no paper 'walkre'; did you mean 'walker'?"),
        (["train", "walker", "pupil"], "walker has no job 'train pupil' (its jobs are train, train teacher, predict)"),
        (["eval", "walker"], "walker has no job 'eval' (its jobs are train, train teacher, predict)"),
        (["train", "idle"], "idle has no jobs: nothing in it is trained, evaluated or applied by a command"),
        (["train", "walker", "--device", "toaster"], "--device must be one that is here (cpu"),
        (["train", "walker", "--workdir", "blocked"], "--workdir must be a folder, got blocked"),
        (["train", "walker", "--config", "gone.yaml"], "--config must be a file that can be read, got gone.yaml"),
        (
            ["train", "walker", "--config", "typo.yaml"],
            "typo.yaml: size.stepps is not an option; did you mean 'steps'?",
        ),
        (["train", "walker", "--config", "type.yaml"], "type.yaml: seed must be a whole number, got 'one'"),
    ],
)
def test_what_is_asked_wrongly_gets_one_sentence_and_2(walk, house, tmp_path, words, sentence):
    house.add("idle")
    (tmp_path / "blocked").write_text("")
    (tmp_path / "typo.yaml").write_text("size: {stepps: 1}")
    (tmp_path / "type.yaml").write_text("seed: one")
    code, out, err = walk(*words)
    assert code == 2 and not out
    assert err.startswith(f"regard: {sentence}") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_options_that_refuse_their_values(walk, tmp_path, capsys):
    (tmp_path / "low.yaml").write_text("size: {steps: -1}")
    for words, got in ((["--size.steps", "0"], "0"), (["--config", "low.yaml"], "-1")):
        with pytest.raises(SystemExit) as end:
            walk("train", "walker", *words)
        assert end.value.code == 2 and f"steps must be at least 1, got {got}" in capsys.readouterr().err
    assert walk("train", "walker", "--config", "low.yaml", "--size.steps", "1")[0] == 0


def test_a_required_option_is_asked_for_unless_the_file_has_it(walk, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        walk("predict", "walker")
    assert end.value.code == 2 and "--input" in capsys.readouterr().err
    (tmp_path / "in.txt").write_text("mine")
    (tmp_path / "c.yaml").write_text("input: in.txt")
    assert walk("predict", "walker", "--config", "c.yaml")[0] == 0


def test_help(walk, capsys):
    with pytest.raises(SystemExit) as end:
        walk("train", "walker", "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    for text in ("regard train walker", "Walks.\n\nAnd says", "Steps to take. (default: 7)", "runs/walker", "--seed"):
        assert text in out
    code, out, _ = walk("predict", "--help")
    assert code == 0 and out.startswith("usage: regard predict SLUG [STAGE] [options]") and "walker" in out


def test_completion_knows_papers_stages_and_options(walk, house, tmp_path):
    house.add("needy", jobs="import a_library_that_is_not_here\nJOBS = {}\n")
    with pytest.raises(SystemExit) as end:
        main.main(["--tyro-write-completion", "bash", str(tmp_path / "completion")])
    assert not end.value.code
    script = (tmp_path / "completion").read_text()
    assert "walker" in script and "teacher" in script and "size.rate" in script


def test_results_that_are_not_a_flat_object_are_only_named(walk, tmp_path, capsys):
    from regard.cli.jobs import _print

    for name, content in (("list.json", [1]), ("deep.json", {"a": {"b": 1}})):
        (tmp_path / name).write_text(json.dumps(content))
        _print(tmp_path / name)
        assert capsys.readouterr().out == f"Written: {tmp_path / name}\n"
