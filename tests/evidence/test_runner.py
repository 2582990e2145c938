"""Measuring claims: every seed once, whatever happens in between."""

import os
import signal
import subprocess
import sys
import time

import pytest

from regard.evidence.runner import UnknownClaim, folder_name, run_claims

SLOW = """
import time
from regard.paper import Claim, Run

def measure(run: Run) -> dict[str, float]:
    root = run.workdir.parents[2]
    with (root / "measured.log").open("a") as log:
        log.write(f"{run.seed}\\n")
    if run.seed == 1 and not (root / "hurry").exists():
        time.sleep(60)
    return {"value": float(run.seed)}

CLAIMS = [Claim("slow", "values stay small", "1", "none", measure, lambda seeds: seeds[-1]["value"] < 5, seeds=3)]
"""

RETURNS = """
from regard.paper import Claim
CLAIMS = [Claim("odd", "s", "p", "b", lambda run: {result}, lambda seeds: True, seeds=2)]
"""


def log(tmp_path, slug):
    return (tmp_path / "runs" / slug / "measured.log").read_text().split()


def test_every_seed_is_measured_and_the_rule_sees_them_all(house, tmp_path):
    [outcome] = run_claims(house.add("counted"), tmp_path / "runs")
    evidence = outcome.evidence
    assert [result.measured["visits"] for result in evidence.results] == [3.0, 4.0]
    assert evidence.measured == {"visits": 3.5, "doors": 2.0}
    assert evidence.holds and evidence.seeds == 2
    assert set(evidence.versions) >= {"python", "regard", "torch"}
    assert "counted_house.counted.claim" in evidence.code and "regard.paper" in evidence.code


def test_a_second_run_measures_only_the_missing_seeds(house, tmp_path):
    paper = house.add("resumed")
    first = run_claims(paper, tmp_path / "runs", seeds=1)
    second = run_claims(paper, tmp_path / "runs", seeds=3)
    assert log(tmp_path, "resumed") == ["0", "1", "2"]
    assert second[0].evidence.results[0] == first[0].evidence.results[0]


def test_a_changed_claim_starts_fresh_and_a_comment_does_not(house, tmp_path, look_again):
    paper = house.add("edited")
    claim = paper.folder / "claim.py"
    run_claims(paper, tmp_path / "runs")
    claim.write_text("# a remark\n" + claim.read_text().replace('"""What is claimed."""', '"""Otherwise said."""'))
    look_again()
    run_claims(paper, tmp_path / "runs")
    assert log(tmp_path, "edited") == ["0", "1"]
    claim.write_text(claim.read_text().replace("3.0 + run.seed", "4.0 + run.seed"))
    look_again()
    run_claims(paper, tmp_path / "runs")
    assert log(tmp_path, "edited") == ["0", "1", "0", "1"]


def test_a_killed_run_continues_with_the_seeds_that_are_missing(house, tmp_path):
    house.add("killed", claim=SLOW)
    command = [sys.executable, "-m", "regard.cli.main", "run", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, env=house.environment, stderr=subprocess.PIPE)
    path = tmp_path / "runs" / "killed" / "measured.log"
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_text().split() == ["0", "1"]):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (path.parent / "hurry").touch()
    again = house.regard("run", "killed")
    assert again.returncode == 0, again.stderr
    assert log(tmp_path, "killed") == ["0", "1", "1", "2"]  # the first seed was not measured again


def test_an_interrupted_run_says_how_to_continue(house, tmp_path):
    house.add("stopped", claim=SLOW)
    command = [sys.executable, "-m", "regard.cli.main", "run", "stopped"]
    process = subprocess.Popen(command, cwd=tmp_path, env=house.environment, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "runs" / "stopped" / "measured.log"
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_text().split() == ["0", "1"]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{'loss': float('nan')}", "claim 'odd', seed 0: 'loss' must be a finite number, got nan"),
        ("{'loss': float('inf')}", "claim 'odd', seed 0: 'loss' must be a finite number, got inf"),
        ("{'loss': 'low'}", "claim 'odd', seed 0: 'loss' must be a number, got a str"),
        ("{}", "claim 'odd', seed 0: measure must return a dict of numbers, got {}"),
        ("{'a': 1.0} if run.seed else {'b': 1.0}", "claim 'odd', seed 1: every seed must measure b, got a"),
    ],
)
def test_what_is_not_a_measurement_is_refused(house, tmp_path, result, message):
    paper = house.add("refused", claim=RETURNS.replace("{result}", result))
    with pytest.raises((ValueError, TypeError)) as caught:
        run_claims(paper, tmp_path)
    assert str(caught.value) == message


def test_a_claim_that_fails_is_an_outcome_not_an_error(house, tmp_path):
    paper = house.add("honest", claim=RETURNS.replace("{result}", "{'a': 1.0}").replace("seeds: True", "seeds: False"))
    [outcome] = run_claims(paper, tmp_path)
    assert outcome.evidence.holds is False


def test_claims_of_one_seed_share_what_they_make_once_and_keep_their_own_pictures(house, tmp_path):
    source = """
    from matplotlib.figure import Figure
    from regard.paper import Claim

    made = []

    def measure(name):
        def of(run):
            run.once("training", lambda: made.append(run.seed))
            run.figure("curve", Figure())
            return {"trainings": float(len(made))}
        return of

    CLAIMS = [Claim(n, "s", "p", "b", measure(n), lambda seeds: True, seeds=2) for n in ("one", "two words")]
    """
    one, two = run_claims(house.add("shared", claim=source), tmp_path)
    assert [r.measured["trainings"] for r in one.evidence.results] == [1.0, 2.0]
    assert [r.measured["trainings"] for r in two.evidence.results] == [1.0, 2.0]
    assert list(one.figures) == ["curve, seed 0", "curve, seed 1"]
    assert {path.parts[-4] for path in two.figures.values()} == {"two-words"}


def test_the_global_generators_do_not_depend_on_what_ran_before(house, tmp_path):
    source = """
    import random
    from regard.paper import Claim

    def measure(run):
        return {"drawn": random.random()}

    CLAIMS = [Claim(n, "s", "p", "b", measure, lambda seeds: True, seeds=1) for n in ("first", "second")]
    """
    paper = house.add("drawn", claim=source)
    both = run_claims(paper, tmp_path / "both")
    alone = run_claims(paper, tmp_path / "alone", only=["second"])
    assert alone[0].evidence.measured == both[1].evidence.measured


def test_unknown_claims_and_wrong_numbers_of_seeds(house, tmp_path):
    paper = house.add("asked")
    with pytest.raises(UnknownClaim, match="asked makes no claim 'visit'; did you mean 'visits'"):
        run_claims(paper, tmp_path, only=["visit"])
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        run_claims(paper, tmp_path, seeds=0)


def test_two_claims_of_one_name_are_refused(house, tmp_path):
    source = RETURNS.replace("{result}", "{'a': 1.0}") + "CLAIMS = CLAIMS * 2\n"
    with pytest.raises(ValueError, match="twice: two claims have the same name"):
        run_claims(house.add("twice", claim=source), tmp_path)


def test_folder_names_are_safe():
    assert folder_name("../recall @ 16k") == "recall-16k"
