"""One file with everything in it, or none."""

import errno
import os
import re

import pytest
from matplotlib.figure import Figure

from regard.evidence.report import Report, evidence_report, format_cell
from regard.evidence.runner import run_claims


def curve() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2, 3])
    return figure


def test_a_report_holds_its_parts_in_order_and_needs_no_other_file(tmp_path):
    path = tmp_path / "curve.png"
    curve().savefig(path)
    report = Report("A title", "and more").heading("One").text("prose").table(["name", "n"], [["a", 1], ["b", 22_000]])
    report.figure(curve(), "drawn").figure(path, "from a file").code("regard list").verdict(True, "It holds")
    page = report.write(tmp_path / "deep" / "report.html").read_text()
    positions = [page.index(text) for text in ("A title", "One", "prose", "22,000", "drawn", "from a file", "It holds")]
    assert positions == sorted(positions)
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_text_is_escaped():
    page = Report("<script>").text("a < b & c").table(["<th>"], [["<td>"]], caption="<cap>").code("<code>").html()
    assert "<script>" not in page and "a &lt; b &amp; c" in page
    assert "&lt;td&gt;" in page and "&lt;cap&gt;" in page and "&lt;code&gt;" in page


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*report\.html: No space left on device"):
        Report("lost").write(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_wrong_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="each row of the table must have 2 cells, got 1"):
        Report("r").table(["a", "b"], [["only"]])
    (tmp_path / "fake.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"fake\.png must be a PNG file"):
        Report("r").figure(tmp_path / "fake.png")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "yes"),
        (3, "3"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (3.0, "3"),
        (54321.5, "54,322"),
        (None, ""),
    ],
)
def test_cells(value, shown):
    assert format_cell(value) == shown


def test_the_report_of_a_run_shows_published_beside_measured(house, tmp_path):
    paper = house.add("reported")
    outcomes = run_claims(paper, tmp_path)
    page = evidence_report(paper, outcomes).html()
    for text in ("4 visits", "On average there are at least 3 visits.", "The claim holds", "nobody", "3.5", "torch"):
        assert text in page
