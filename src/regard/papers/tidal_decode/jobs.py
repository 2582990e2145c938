"""What `regard train tidal_decode` runs: the layer that should choose anew in a model of yours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from regard.data.text import read_texts
from regard.llm.load import load
from regard.llm.longcontext import Haystack
from regard.paper import Run
from regard.papers.tidal_decode.cache_policy import TidalDecode
from regard.papers.tidal_decode.claim import draw_layers
from regard.papers.tidal_decode.search import Search, find_layer


@dataclass(frozen=True)
class Train:
    """Finds the layer that should choose anew, by the loss on passkeys hidden in text.

    Writes the policy to `policy.json`, for `TidalDecode.load(FOLDER)`, and the losses and the recall of all layers to
    `search.json`; the layer that was found goes to `regard generate` as `--policy tidal_decode --reselect LAYER`.
    """

    model: str = "smollm2"
    """A folder, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    text: Path | None = None
    """A text file, or a folder of them, to hide the passkeys in; by default the Python language reference."""
    select: int = 2
    """The first layer that chooses."""
    search: Search = field(default_factory=Search)

    def run(self, run: Run) -> Path:
        """The folder with the policy."""
        loaded = load(self.model, device=run.device)
        haystack = Haystack(loaded.tokenizer, None if self.text is None else read_texts(self.text))
        policy = TidalDecode(budget=self.search.budget, select=self.select, reselect=None)
        found = find_layer(
            loaded.model, haystack, policy, self.search, progress=lambda names: run.progress(names, "trying layers")
        )
        run.figure("layers", draw_layers(found))
        found.save(run.workdir, policy)
        return run.workdir


JOBS = {"train": Train}
