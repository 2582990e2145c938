"""What `regard train razor_attention` runs: the heads of a model of yours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from regard.llm.load import load
from regard.paper import Run
from regard.papers.razor_attention.claim import draw_scores
from regard.papers.razor_attention.heads import FILE, save_heads
from regard.papers.razor_attention.search import Probe, choose, head_scores


@dataclass(frozen=True)
class Train:
    """Finds the heads that retrieve, by one pass of random tokens that repeat.

    Writes `heads.json`; give it, or its folder, to `regard generate` as `--policy razor_attention --heads`.
    """

    model: str = "smollm2"
    """A folder, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    probe: Probe = field(default_factory=Probe)
    induction: float = 0.14
    """Share of the KV heads to protect by their induction score."""
    echo: float = 0.01
    """Share of the KV heads to protect by their echo score."""

    def run(self, run: Run) -> Path:
        """The file with the heads."""
        loaded = load(self.model, device=run.device)
        scores = head_scores(
            loaded.model, self.probe, run.seed, steps=lambda tiles: run.progress(tiles, "reading random tokens")
        )
        heads = choose(scores, self.induction, self.echo)
        run.figure("scores", draw_scores(scores, heads))
        about = {"model": loaded.name, "block": self.probe.block, "repeats": self.probe.repeats, "seed": run.seed}
        return save_heads(dataclasses.replace(heads, settings={**heads.settings, **about}), run.workdir / FILE)


JOBS = {"train": Train}
