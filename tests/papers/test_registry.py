"""Every room of the house, and what its card must say."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from regard import papers
from regard.paper import Paper

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
ROOMS = [paper for paper in papers.all() if paper.module.startswith("regard.papers.")]


def test_the_nearest_slug_is_named(house):
    house.add("doorway")
    with pytest.raises(papers.UnknownPaper, match="no paper 'dorway'; did you mean 'doorway'"):
        papers.get("dorway")
    with pytest.raises(papers.UnknownPaper, match=r"no paper 'zzz' \(regard list shows all"):
        papers.get("zzz")


def test_papers_come_by_slug_and_are_found_by_it(house):
    house.add("b_room")
    house.add("a_room")
    slugs = [paper.slug for paper in papers.all()]
    assert slugs == sorted(slugs) and {"a_room", "b_room"} <= set(slugs)
    assert papers.get("a_room").module == "a_room_house.a_room"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("slug: {slug}", "slug: other"), "slug must be 'door', the name of the room, got 'other'"),
        (("authors: 2\n", ""), "authors"),
        (("authors: 2\n", "authors: 2\ncolour: red\n"), "colour"),
        (("provides: [analysis]", "provides: [magic]"), "magic"),
        (("provides: [analysis]", "provides: ["), "does not describe a paper"),
        (("---\nslug", "slug"), "must begin with front matter"),
    ],
)
def test_a_card_that_is_wrong_is_named_with_its_field(house, change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        house.add("door", card=house.card.replace(*change))
    assert "door" in str(caught.value)


@pytest.mark.parametrize("paper", ROOMS, ids=lambda paper: paper.slug)
class TestRoom:
    """What holds for each of our own rooms."""

    def test_the_card_says_all_that_the_record_needs(self, paper: Paper):
        for field in ("title", "venue", "family", "summary"):
            assert getattr(paper, field).strip(), field
        assert paper.authors >= 1 and paper.provides
        assert paper.published, "a card shows what its authors report"
        for row in paper.published:
            assert row.claim and row.figure and row.data
        assert set(paper.extends) <= {other.slug for other in ROOMS}
        assert re.search(r"^```python$", paper.page, re.MULTILINE), "a card has a snippet to start from"

    def test_the_snippets_of_the_card_run(self, paper: Paper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        scope: dict[str, object] = {"__name__": "__card__"}
        for snippet in re.findall(r"^```python\n(.*?)^```$", paper.page, re.MULTILINE | re.DOTALL):
            exec(compile(snippet, str(paper.folder / "card.md"), "exec"), scope)

    def test_the_examples_are_public(self, paper: Paper):
        room = import_module(paper.module)
        assert paper.examples(), "EXAMPLES has a tiny instance of each public class"
        for name, make in paper.examples().items():
            assert hasattr(room, name), name
            assert isinstance(make(), getattr(room, name))

    def test_claims_are_stated_in_full(self, paper: Paper):
        claims = paper.claims()
        assert claims
        for claim in claims:
            assert claim.name and claim.statement and claim.published and claim.baseline
            assert claim.seeds >= 1 and claim.minutes > 0


def test_the_linters_exceptions_are_what_the_papers_extend():
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    [independence] = [contract for contract in contracts if contract["type"] == "independence"]
    allowed = set(independence["ignore_imports"])
    expected = {
        f"regard.papers.{paper.slug}.** -> regard.papers.{base}.**" for paper in ROOMS for base in paper.extends
    }
    assert allowed == expected
