"""What a measurement rests on, by its syntax alone."""

import subprocess
import sys

from regard.evidence.staleness import code_hashes, stale, syntax_hash

CLAIM = """
from regard.data.files import write_atomically
from .helper import number
CLAIMS = []
"""


def test_comments_layout_and_docstrings_do_not_count():
    one = 'def f(x):\n    """Doc."""\n    return x + 1\n\n\nclass C:\n    a: int = 1\n    """A field."""\n'
    two = "# remark\ndef f( x ):\n    return (x+1)  # why\nclass C:\n    'Other.'\n    a: int = 1\n"
    assert syntax_hash(one) == syntax_hash(two)


def test_what_the_code_does_counts():
    assert syntax_hash("x = 1") != syntax_hash("x = 2")
    assert syntax_hash("x = 'text'") != syntax_hash("x = 'other text'")
    assert syntax_hash("def f(): return 1") != syntax_hash("def g(): return 1")


def test_the_closure_holds_what_is_reached_and_nothing_else(house):
    helper = "import regard.paper\nnumber = 3\n"
    paper = house.add("reached", claim=CLAIM, helper=helper, bystander="number = 4\n")
    modules = set(code_hashes(paper))
    assert {"reached_house.reached.claim", "reached_house.reached.helper", "regard.data.files"} <= modules
    assert "regard.paper" in modules  # by way of the helper
    assert not modules & {"reached_house.reached.bystander", "regard.cli.main"}


def test_stale_names_the_modules_that_changed(house, look_again):
    paper = house.add("aged", claim=CLAIM, helper="number = 3\n")
    recorded = code_hashes(paper)
    assert stale(paper, recorded) == []
    (paper.folder / "helper.py").write_text('"""A page of prose."""\n\nnumber = 3  # three\n')
    look_again()
    assert stale(paper, recorded) == []
    (paper.folder / "helper.py").write_text("number = 4\n")
    look_again()
    assert stale(paper, recorded) == ["aged_house.aged.helper"]
    (paper.folder / "claim.py").write_text("CLAIMS = []\n")
    look_again()
    assert "regard.data.files" in stale(paper, recorded)  # no longer reached


def test_a_room_without_claims_rests_on_nothing(house):
    paper = house.add("silent")
    (paper.folder / "claim.py").unlink()
    assert code_hashes(paper) == {}


def test_looking_imports_neither_the_room_nor_torch(house):
    paper = house.add("unseen", claim="raise RuntimeError('imported')\n")
    (paper.folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    code = (
        "import sys; from regard import papers; from regard.evidence.staleness import code_hashes\n"
        "hashes = code_hashes(papers.get('unseen'))\n"
        "assert 'unseen_house.unseen.claim' in hashes, hashes\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=house.environment, check=True)
