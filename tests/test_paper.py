"""The vocabulary."""

import datetime
import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from regard.paper import Paper, Run


@pytest.fixture
def paper(tmp_path) -> Paper:
    (tmp_path / "card.md").write_text("---\nslug: x\n---\n\n# The page\n\n---\n\nbelow a rule\n")
    return Paper(
        slug="x", title="t", date=datetime.date(2024, 1, 1), authors=1, arxiv=None, venue="v", code=None, license=None,
        family="f", provides=("mixer",), summary="s", published=(), extends=(), module="regard", folder=tmp_path,
    )  # fmt: skip


def test_the_page_is_the_card_without_its_front_matter(paper):
    assert paper.page == "# The page\n\n---\n\nbelow a rule"


def test_what_a_paper_provides_is_one_of_the_kinds(house):
    with pytest.raises(Exception, match="provides"):  # while annotations are checked, they find it first
        house.add("visitor", card=house.card.replace("[analysis]", "[mixer, magic]"))
    answer = house.regard("list")
    assert answer.returncode == 1
    assert "visitor: provides must be out of mixer, model, " in answer.stderr and "got 'magic'" in answer.stderr


def test_a_room_need_not_have_every_part(paper):
    assert paper.part("claim") is None and list(paper.claims()) == [] and dict(paper.jobs()) == {}
    assert dict(paper.examples()) == {}
    assert paper.part("paper").Paper is Paper


def test_progress_gives_every_item_with_or_without_a_display(tmp_path):
    assert list(Run(0, tmp_path).progress(range(3), "counting")) == [0, 1, 2]
    display = Progress(console=Console(file=io.StringIO()))
    seen = []
    for item in Run(0, tmp_path, display=display).progress(iter("abc"), "letters", total=3):
        assert display.tasks[-1].total == 3
        seen.append(item)
    assert seen == ["a", "b", "c"] and not display.tasks


def test_progress_leaves_no_bar_behind_after_an_error(tmp_path):
    display = Progress(console=Console(file=io.StringIO()))
    loop = Run(0, tmp_path, display=display).progress([1, 2], "failing")
    next(loop)
    loop.close()
    assert not display.tasks


def test_once_makes_once_and_keeps_nothing_between_runs(tmp_path):
    made = []
    run = Run(0, tmp_path)
    assert [run.once("k", lambda: made.append(1) or len(made)) for _ in range(2)] == [1, 1]
    assert Run(0, tmp_path).shared == {}


def test_a_figure_is_saved_under_its_name(tmp_path):
    path = Run(0, tmp_path / "new").figure("loss", Figure())
    assert path == tmp_path / "new" / "figures" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
