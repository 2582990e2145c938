"""The README says what the cards and the evidence say."""

from pathlib import Path

import pytest

from regard import papers
from regard.evidence.table import END, START, papers_table, refreshed

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert refreshed(text) == text, "make docs brings the table up to date"


def test_only_the_section_between_the_markers_changes():
    page = f"before\n{START}\nold\n{END}\nafter\n"
    assert refreshed(page) == f"before\n{START}\n{papers_table()}\n{END}\nafter\n"
    assert refreshed(refreshed(page)) == refreshed(page)


@pytest.mark.parametrize("page", ["nothing", START, f"{START}{START}{END}"])
def test_missing_markers_are_named(page):
    with pytest.raises(ValueError, match="the page must contain the marker"):
        refreshed(page)


def test_the_table_lists_our_rooms_and_not_a_visitors(house):
    house.add("guest")
    table = papers_table()
    assert "guest" not in table
    for paper in papers.all():
        if paper.module.startswith("regard.papers."):
            assert f"[{paper.slug}]" in table
