"""What `regard train a2sf` runs: a forgetting factor for a model of yours."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from regard.data.files import write_atomically
from regard.data.text import read_texts
from regard.llm.load import load
from regard.llm.longcontext import Haystack
from regard.paper import Run
from regard.papers.a2sf.cache_policy import A2SF
from regard.papers.a2sf.search import FACTORS, best_factor, draw_passages, sweep


@dataclass(frozen=True)
class Train:
    """Finds the forgetting factor with which a model predicts text best at the budget, by trying several.

    Writes the policy to `policy.json`, for `A2SF.load(FOLDER)`, and every factor's loss to `losses.json`; give the
    factor to `regard generate` as `--policy a2sf --forgetting`.
    """

    model: str = "smollm2"
    """A folder, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    text: Path | None = None
    """A text file, or a folder of them, to predict; by default the Python language reference."""
    budget: int = 128
    """Tokens that every KV head keeps in the search, and in the policy that is written."""
    recent: int = 0
    """How many of them are the last ones."""
    streaming: int = 0
    """How many are the first ones."""
    passages: int = 4
    """Pieces of text to predict."""
    length: int = 512
    """Tokens of a piece, of which the second half counts; more than twice the budget."""
    factors: tuple[float, ...] = FACTORS
    """The forgetting factors to try."""

    def __post_init__(self) -> None:
        if self.length < 2 * self.budget:
            raise ValueError(f"length must be at least twice the budget of {self.budget} tokens, got {self.length}")
        if self.passages < 1:
            raise ValueError(f"passages must be at least 1, got {self.passages}")
        if not self.factors:
            raise ValueError("factors must name at least one forgetting factor, got none")
        for factor in self.factors:
            _ = dataclasses.replace(self.policy, forgetting=factor)

    @property
    def policy(self) -> A2SF:
        """The policy whose factor is looked for."""
        return A2SF(self.budget, recent=self.recent, streaming=self.streaming)

    def run(self, run: Run) -> Path:
        """The folder with the policy."""
        loaded = load(self.model, device=run.device)
        haystack = Haystack(loaded.tokenizer, None if self.text is None else read_texts(self.text))
        pieces = draw_passages(haystack, self.passages, self.length, run.seed, "train")
        losses = sweep(
            loaded.model, pieces, self.policy, self.factors, lambda factors: run.progress(factors, "forgetting factors")
        )
        run.figure("losses", draw_losses(losses))
        folder = run.workdir / "policy"
        dataclasses.replace(self.policy, forgetting=best_factor(losses)).save(folder)
        write_atomically(folder / "losses.json", json.dumps({str(a): loss for a, loss in losses.items()}) + "\n")
        return folder


def draw_losses(losses: dict[float, float]) -> Figure:
    """The loss by forgetting factor."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), marker="o")
    axes.set(xlabel="forgetting factor", ylabel="nats per token", title="every token a step with eviction")
    return figure


JOBS = {"train": Train}
