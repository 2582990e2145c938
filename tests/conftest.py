"""Every shape in an annotation of regard is checked while the tests run; and a room to visit."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("regard", "beartype.beartype")

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from regard.paper import Paper

hypothesis.settings.register_profile("regard", deadline=None)  # how long an example takes says how busy the machine is
hypothesis.settings.load_profile("regard")

CARD = """\
---
slug: {slug}
title: "Attention is a visitor"
date: 2024-05-06
authors: 2
arxiv: "2405.00000"
venue: "A workshop"
code: null
license: null
family: made_up
provides: [analysis]
summary: "A room made for the tests."
published:
  - claim: "visits are counted"
    figure: "Table 1"
    data: "doors"
extends: []
---
# A visitor

The page of *{slug}*.
"""

CLAIM = '''\
"""What is claimed."""

from regard.paper import Claim, Run


def measure(run: Run) -> dict[str, float]:
    with (run.workdir.parents[2] / "measured.log").open("a") as log:
        log.write(f"{run.seed}\\n")
    return {"visits": 3.0 + run.seed, "doors": 2.0}


CLAIMS = [
    Claim(
        name="visits",
        statement="On average there are at least 3 visits.",
        published="4 visits",
        baseline="nobody",
        measure=measure,
        holds=lambda seeds: sum(seed["visits"] for seed in seeds) / len(seeds) >= 3,
        seeds=2,
    )
]
'''


@dataclass
class House:
    """Another package, installed beside regard, that offers rooms by entry point."""

    site: Path
    card: str = CARD

    def add(self, slug: str, claim: str = CLAIM, card: str | None = None, **files: str) -> "Paper":
        """The paper of a new room, with these files in it."""
        from regard import papers

        room = self.site / f"{slug}_house" / slug
        room.mkdir(parents=True)
        (room.parent / "__init__.py").write_text("")
        (room / "__init__.py").write_text("")
        (room / "card.md").write_text((card or self.card).replace("{slug}", slug))
        (room / "claim.py").write_text(dedent(claim))
        for name, source in files.items():
            (room / f"{name}.py").write_text(dedent(source))
        info = self.site / f"{slug}_house-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {slug}-house\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[regard.papers]\n{slug} = {slug}_house.{slug}\n")
        forget()
        return papers.get(slug)

    def regard(self, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """What the command line answers, in a process of its own that sees this package."""
        return subprocess.run(
            [sys.executable, "-m", "regard.cli.main", *map(str, words)],
            cwd=cwd or self.site.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.site), "COLUMNS": "140", "PYTHONDONTWRITEBYTECODE": "1"}


def forget() -> None:
    """Makes regard look at the file system again."""
    from regard import papers
    from regard.evidence import staleness

    importlib.invalidate_caches()
    papers._rooms.cache_clear()
    staleness._imports.cache_clear()
    staleness._module_hash.cache_clear()


@pytest.fixture
def look_again() -> Callable[[], None]:
    return forget


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    yield House(site)
    for name in set(sys.modules) - before:
        if "_house" in name:
            del sys.modules[name]
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A token for each byte, after <pad>, <s> and </s>; it can chat, and marks no start of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    return made
