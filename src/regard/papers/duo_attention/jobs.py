"""What `regard train duo_attention` runs: gates for a model of yours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from regard.data.text import read_texts
from regard.llm.load import load
from regard.llm.longcontext import Haystack
from regard.paper import Run
from regard.papers.duo_attention.gates import save_gates
from regard.papers.duo_attention.training import SMALL, GateTraining, PasskeyData, train_gates


@dataclass(frozen=True)
class Train:
    """Trains one gate per KV head on passkeys, so that `DuoAttention` knows which heads retrieve.

    Writes the gates in the authors' format to the folder `gates`; give it to `regard generate` as
    `--policy duo_attention --gates FOLDER`. A run that was interrupted goes on where it stopped.
    """

    model: str = "smollm2"
    """A folder, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    text: Path | None = None
    """A text file, or a folder of them, to hide the passkeys in; by default the Python language reference."""
    training: GateTraining = field(default_factory=lambda: SMALL)
    data: PasskeyData = field(default_factory=PasskeyData)
    checkpoint_every: int = 10
    """Steps between two checkpoints."""

    def run(self, run: Run) -> Path:
        """The folder with the gates."""
        loaded = load(self.model, device=run.device)
        haystack = Haystack(loaded.tokenizer, None if self.text is None else read_texts(self.text))
        data = replace(self.data, seed=run.seed)

        def progress(steps: Iterable[int], total: int) -> Iterable[int]:
            return run.progress(steps, "training gates", total)

        trainer = train_gates(
            loaded.model,
            lambda step: data.example(haystack, step),
            self.training,
            checkpoint=run.workdir / "training.pt",
            checkpoint_every=self.checkpoint_every,
            progress=progress,
        )
        gates = trainer.result(
            model_name=loaded.name,
            num_passkeys=data.passkeys,
            passkey_length=data.words,
            context_length=data.context,
            batch_size=data.batch,
            seed=data.seed,
        )
        return save_gates(gates, run.workdir / "gates")


JOBS = {"train": Train}
