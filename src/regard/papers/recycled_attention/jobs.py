"""What `regard train recycled_attention` runs: continued pre-training of a model of yours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from regard.data.files import write_atomically
from regard.data.text import python_reference, read_texts
from regard.llm.load import load
from regard.paper import Run
from regard.papers.recycled_attention.training import SMALL, ContinuedTraining, train_on


@dataclass(frozen=True)
class Train:
    """Trains a model on, so that it reads well with the small cache; recycled attention works without it, too.

    Writes the model to the folder `model`; give it to `regard generate` as `--model FOLDER --policy
    recycled_attention`. A run that was interrupted goes on where it stopped.
    """

    model: str = "smollm2"
    """A folder, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    text: Path | None = None
    """A text file, or a folder of them, to train on; by default the Python language reference."""
    training: ContinuedTraining = field(default_factory=lambda: SMALL)
    checkpoint_every: int = 50
    """Steps between two checkpoints."""

    def run(self, run: Run) -> Path:
        """The folder with the model and its tokenizer."""
        loaded = load(self.model, device=run.device)
        text = python_reference() if self.text is None else read_texts(self.text)
        tokens = torch.tensor(loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

        def progress(steps: Iterable[int], total: int) -> Iterable[int]:
            return run.progress(steps, "training", total)

        losses = train_on(
            loaded.model,
            tokens,
            self.training,
            seed=run.seed,
            checkpoint=run.workdir / "training.pt",
            checkpoint_every=self.checkpoint_every,
            progress=progress,
        )
        folder = run.workdir / "model"
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        write_atomically(folder / "losses.json", json.dumps(losses) + "\n")
        return folder


JOBS = {"train": Train}
