"""The pages say what is so: their links lead somewhere and their snippets run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "adding-a-paper.md"
FENCE = re.compile(r"^(?P<fence>`{3,4})(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "architecture.md"], ids=lambda page: page.name)
def test_snippets_run(page, tmp_path):
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        if fence["language"] == "python":
            run = subprocess.run([sys.executable, "-c", fence["text"]], cwd=tmp_path, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", TUTORIAL], ids=lambda page: page.name)
def test_verbs_that_are_named_exist(page):
    from regard.cli.main import VERBS

    named = set(re.findall(r"\bregard ([a-z]+)\b(?=[^\n]*[`\n])", "\n".join(commands(page))))
    assert named and named <= set(VERBS)


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    fenced = [
        line for fence in FENCE.finditer(text) if fence["language"] == "sh" for line in fence["text"].splitlines()
    ]
    return [f"{line}\n" for line in fenced] + re.findall(r"`regard [^`]*`", FENCE.sub("", text))


def test_the_readme_names_the_extras_that_there_are():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sentence = re.search(r"The extras are (.*?); `all`", (ROOT / "README.md").read_text(), re.DOTALL)
    named = re.findall(r"`(\w+)`", sentence[1])
    assert named == [name for name in extras if name not in ("all", "dev")]
    assert extras["all"] == [f"regard[{','.join(named)}]"]


@pytest.fixture
def tutorial(tmp_path):
    """The files of the tutorial as a reader would have them, installed."""
    site = tmp_path / "site"
    text = TUTORIAL.read_text(encoding="utf-8")
    files = re.findall(r"^`([\w./]+)`\n\n(?P<fence>`{3,4})\w+\n(.*?)^(?P=fence)$", text, re.MULTILINE | re.DOTALL)
    for name, _, content in files:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    (site / "my_rooms" / "__init__.py").write_text("")
    info = site / "my_rooms-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rooms\nVersion: 0.1.0\n")
    entry = re.search(r"^average_attention = \"(.*)\"$", text, re.MULTILINE)
    (info / "entry_points.txt").write_text(f"[regard.papers]\naverage_attention = {entry[1]}\n")
    environment = os.environ | {"PYTHONPATH": str(site)}

    def call(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return call


def test_the_paper_of_the_tutorial_works(tutorial, tmp_path):
    shown = tutorial("-m", "regard.cli.main", "show", "average_attention")
    assert shown.returncode == 0 and "running sum" in shown.stdout, shown.stderr
    run = tutorial("-m", "regard.cli.main", "run", "average_attention", "--record", "--json")
    assert run.returncode == 0, run.stderr
    [claim] = json.loads(run.stdout)
    assert claim["holds"] and claim["measured"]["bytes_1"] == (64 + 1) * 4
    assert (tmp_path / "site" / "my_rooms" / "average_attention" / "evidence.json").exists()
    assert "data:image/png" in (tmp_path / "runs" / "average_attention" / "report.html").read_text()


def test_the_mixer_of_the_tutorial_obeys_the_laws(tutorial):
    checks = """
import re, torch
from my_rooms.average_attention import EXAMPLES, MIXERS
from regard import papers

mixer = EXAMPLES["AverageAttention"]()
x = torch.randn(2, 7, 8)
whole, end = mixer(x)
first, state = mixer(x[:, :3])
nothing, state = mixer(x[:, 3:3], state)
rest, state = mixer(x[:, 3:], state)
torch.testing.assert_close(torch.cat([first, nothing, rest], 1), whole)
torch.testing.assert_close(state, end)
later = x.clone()
later[:, 4:] += 1
torch.testing.assert_close(mixer(later)[0][:, :4], whole[:, :4])
assert MIXERS["average_attention"](16)(torch.randn(1, 2, 16))[0].shape == (1, 2, 16)
page = papers.get("average_attention").page
for snippet in re.findall(r"^```python\\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
    exec(snippet)
"""
    run = tutorial("-c", checks)
    assert run.returncode == 0, run.stderr
