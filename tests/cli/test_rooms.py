"""A room of another package is listed, shown, run and recorded like our own."""

import json
import os
import stat

import pytest

from regard.evidence import store


def test_a_visiting_room_is_treated_like_our_own(house, tmp_path):
    paper = house.add("visitor")
    listed = house.regard("list")
    assert listed.returncode == 0 and "visitor" in listed.stdout and "Attention is a visitor" in listed.stdout

    shown = house.regard("show", "visitor")
    assert "The page of visitor." in shown.stdout and "Nothing is recorded yet" in shown.stdout

    run = house.regard("run", "visitor", "--record")
    assert run.returncode == 0, run.stderr
    assert "4 visits" in run.stdout and "visits 3.5" in run.stdout and "yes" in run.stdout
    assert (tmp_path / "runs" / "visitor" / "report.html").exists()
    assert paper.folder.is_relative_to(house.site)
    [evidence] = store.read(paper)
    assert evidence.claim == "visits" and evidence.holds and evidence.seeds == 2

    assert "visits 3.5" in house.regard("show", "visitor").stdout
    table = house.regard("evidence", "visitor").stdout
    assert "visits 3.5" in table and "unchanged" in table

    claim = paper.folder / "claim.py"
    claim.write_text(claim.read_text().replace("3.0 + run.seed", "2.0 + run.seed"))
    changed = house.regard("evidence", "visitor")
    assert changed.returncode == 0 and "visitor: visitor_house.visitor.claim" in changed.stdout


def test_what_scripts_read(house, tmp_path):
    house.add("scripted")
    [record] = [row for row in json.loads(house.regard("list", "--json").stdout) if row["slug"] == "scripted"]
    assert record == {
        "slug": "scripted",
        "title": "Attention is a visitor",
        "date": "2024-05-06",
        "authors": 2,
        "arxiv": "2405.00000",
        "venue": "A workshop",
        "code": None,
        "license": None,
        "family": "made_up",
        "provides": ["analysis"],
        "summary": "A room made for the tests.",
        "published": [{"claim": "visits are counted", "figure": "Table 1", "data": "doors"}],
        "extends": [],
        "module": "scripted_house.scripted",
    }
    run = house.regard("run", "scripted", "--seeds", "1", "--record", "--json")
    [measured] = json.loads(run.stdout)
    assert measured["measured"] == {"visits": 3.0, "doors": 2.0} and measured["holds"] is True
    assert measured["seeds"][0]["seed"] == 0 and measured["report"].endswith("report.html")
    [evidence] = json.loads(house.regard("evidence", "scripted", "--json").stdout)
    assert set(evidence) == {"slug", "claim", "holds", "measured", "seeds", "recorded_at", "stale"}
    assert evidence["slug"] == "scripted" and evidence["claim"] == "visits"
    assert evidence["holds"] is True and evidence["seeds"] == 1
    assert evidence["stale"] == [] and evidence["measured"] == {"visits": 3.0, "doors": 2.0}
    shown = json.loads(house.regard("show", "scripted", "--json").stdout)
    assert shown["evidence"] == [evidence] and shown["page"].startswith("# A visitor")


def test_nothing_is_recorded_unless_it_is_asked_for(house):
    paper = house.add("unasked")
    assert house.regard("run", "unasked").returncode == 0
    assert not store.evidence_path(paper).exists()


def test_a_corrupted_evidence_file_is_said_before_anything_is_measured(house, tmp_path):
    paper = house.add("broken")
    store.evidence_path(paper).write_text('{"claims": ')
    for words in (["evidence"], ["show", "broken"], ["run", "broken", "--record"]):
        answer = house.regard(*words)
        assert answer.returncode == 1
        assert str(store.evidence_path(paper)) in answer.stderr and "Traceback" not in answer.stderr
        assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "broken" / "measured.log").exists()
    assert house.regard("list").returncode == 0  # one broken file does not hide the other papers


def test_nan_is_refused_by_name(house):
    source = """
    from regard.paper import Claim
    CLAIMS = [Claim("odd", "s", "p", "b", lambda run: {"loss": float("nan")}, lambda seeds: True)]
    """
    paper = house.add("nan", claim=source)
    answer = house.regard("run", "nan", "--record")
    assert answer.returncode == 1
    assert answer.stderr == "regard: claim 'odd', seed 0: 'loss' must be a finite number, got nan\n"
    assert not store.evidence_path(paper).exists()


@pytest.mark.parametrize("markup", ["[bold]", "[/]", "<b>"])
def test_names_may_hold_what_looks_like_markup(house, tmp_path, markup):
    source = f"""
    from regard.paper import Claim
    CLAIMS = [
        Claim("a {markup}", "s {markup}", "p {markup}", "b", lambda run: {{"x": 1.0}}, lambda seeds: True, seeds=1)
    ]
    """
    house.add("marked", claim=source)
    answer = house.regard("run", "marked", "--record")
    assert answer.returncode == 0, answer.stderr
    assert f"a {markup}" in answer.stdout
    assert f"a {markup}" in house.regard("evidence", "marked").stdout


def test_a_folder_that_cannot_be_written_is_named(house, tmp_path):
    paper = house.add("sealed")
    if os.geteuid() == 0:  # root writes anywhere: let a folder stand where the file should be
        store.evidence_path(paper).mkdir()
    else:
        paper.folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    answer = house.regard("run", "sealed", "--record")
    paper.folder.chmod(stat.S_IRWXU)
    assert answer.returncode == 1
    assert str(paper.folder) in answer.stderr and answer.stderr.count("\n") == 1


def test_a_room_without_a_claim_says_so(house):
    paper = house.add("quiet")
    (paper.folder / "claim.py").unlink()
    answer = house.regard("run", "quiet")
    assert answer.returncode == 2 and answer.stderr == "regard: quiet makes no claim that can be run\n"
