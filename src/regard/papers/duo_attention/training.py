"""Training of the gates: a stream with full attention teaches a stream with mixed attention, all weights frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attention.attend import attend
from regard.data.files import as_bytes, write_atomically
from regard.llm.attach import attach
from regard.llm.longcontext import Haystack, Prompt, passkeys
from regard.llm.policy import kv_heads
from regard.llm.visible import Visible
from regard.papers.duo_attention.gates import Gates
from regard.papers.duo_attention.streaming import streaming_attention

FullSource = Literal["teacher", "self"]


@dataclass(frozen=True)
class GateTraining:
    """How the gates are trained; the defaults are the paper's."""

    steps: int = 2000
    learning_rate: float = 0.02
    """Peak of the schedule. Adam moves a gate by about this much per step, so it must be at least 1 / steps."""
    regularisation: float = 0.05
    """Weight of the mean gate in the loss: the pull towards streaming."""
    sinks: int = 128
    """First tokens that a streaming head sees."""
    recent: int = 256
    """Last tokens that a streaming head sees, the query's own included."""
    full_source: FullSource = "teacher"
    """Where the full attention in the mixture comes from. teacher: the full stream's, as in the released code; self:
    the mixed stream's own queries, keys and values, as in the paper's formula."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("sinks", 0), ("recent", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.learning_rate * self.steps < 1:
            raise ValueError(
                f"learning_rate must be at least 1 / steps = {1 / self.steps:.3g}, or no gate can get from 1 to 0, "
                f"got {self.learning_rate}"
            )
        if self.regularisation < 0:
            raise ValueError(f"regularisation must be at least 0, got {self.regularisation}")
        if self.full_source not in ("teacher", "self"):
            raise ValueError(f"full_source must be 'teacher' or 'self', got {self.full_source!r}")


class Example(NamedTuple):
    """Token sequences, and where the two streams must agree. Shorter rows are filled up at their end."""

    tokens: Int64[Tensor, "batch tokens"]
    supervised: Bool[Tensor, "batch tokens"]


class Loss(NamedTuple):
    """What a step minimises, and its two terms."""

    total: Float[Tensor, ""]
    distillation: Float[Tensor, ""]
    regularisation: Float[Tensor, ""]


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate that a step has: linear rise and fall over a fifth of the steps, >= 0.1.

    Source: Appendix A.1, and the `LambdaLR` of the authors' `train.py`.
    """
    edge = max(steps // 5, 1)
    return min(1.0, max((step + 1) / edge, 0.1), max((steps - step) / edge, 0.1))


def gated_loss(
    model: PreTrainedModel, example: Example, gates: Float[Tensor, "layers kv_heads"], training: GateTraining
) -> Loss:
    """The distance between the hidden states of both streams after the final norm, plus the pull on the gates.

    The mean over supervised positions of the mean over channels of the squared difference, in fp32. Gradients flow to
    the gates alone if the weights are frozen.

    Source: section 2.2, eq. 2-4; the factor 0.05 goes with the mean of the gates, as in the authors' `l1_loss`.
    """
    full, remembered = _full_stream(model, example.tokens, keep=training.full_source == "teacher")
    mixed = _mixed_stream(model, example.tokens, gates, remembered, training)
    distance = (full[example.supervised].float() - mixed[example.supervised].float()).square().mean()
    pull = gates.abs().mean()
    return Loss(distance + training.regularisation * pull, distance, pull)


def _full_stream(
    model: PreTrainedModel, tokens: Int64[Tensor, "batch tokens"], keep: bool
) -> tuple[Float[Tensor, "batch tokens channels"], dict[int, Tensor]]:
    """The hidden states under ordinary attention, and every layer's attention output."""
    remembered: dict[int, Tensor] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        out = attend(query, key, value, mask=visible.over(), scale=scale)
        if keep:
            remembered[_layer(module)] = out
        return out

    with attach(model, attention), torch.no_grad():
        return model.base_model(tokens, use_cache=False).last_hidden_state, remembered


def _mixed_stream(
    model: PreTrainedModel,
    tokens: Int64[Tensor, "batch tokens"],
    gates: Float[Tensor, "layers kv_heads"],
    full_outputs: dict[int, Tensor],
    training: GateTraining,
) -> Float[Tensor, "batch tokens channels"]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, visible: Visible, scale: float
    ) -> Tensor:
        sinks = key[:, :, : training.sinks], value[:, :, : training.sinks]
        streaming = streaming_attention(query, key, value, *sinks, recent=training.recent, visible=visible, scale=scale)
        layer = _layer(module)
        if training.full_source == "teacher":
            full = full_outputs[layer]
        else:
            full = attend(query, key, value, mask=visible.over(), scale=scale)
        gate = gates[layer].clamp(0.0, 1.0).to(query.dtype).repeat_interleave(query.shape[1] // key.shape[1])
        return torch.lerp(streaming, full, gate[:, None, None])

    with attach(model, attention):
        return model.base_model(tokens, use_cache=False).last_hidden_state


def _layer(module: nn.Module) -> int:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return layer


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model's weights want no gradient inside the block, and dropout is off; as before after it."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    was_training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for weight, wanted in before:
            weight.requires_grad_(wanted)
        model.train(was_training)


@dataclass
class GateTrainer:
    """Trains the gates of one model step by step; what it has done so far can be saved and taken up again exactly."""

    model: PreTrainedModel
    training: GateTraining
    step: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)
    """Distillation loss and mean gate of every step."""

    def __post_init__(self) -> None:
        config = self.model.config.get_text_config()
        shape = config.num_hidden_layers, kv_heads(config)
        self.gates = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=self.model.device))
        self.optimiser = torch.optim.AdamW([self.gates], lr=self.training.learning_rate, weight_decay=0.0)

    def advance(self, example: Example) -> Loss:
        """The loss of one step, which it takes."""
        with torch.no_grad():
            self.gates.clamp_(0.0, 1.0)
        self.optimiser.param_groups[0]["lr"] = self.training.learning_rate * schedule(self.step, self.training.steps)
        device = self.model.device
        with torch.enable_grad():
            example = Example(example.tokens.to(device), example.supervised.to(device))
            loss = gated_loss(self.model, example, self.gates, self.training)
            (self.gates.grad,) = torch.autograd.grad(loss.total, self.gates)
        self.optimiser.step()
        self.step += 1
        self.history.append((loss.distillation.item(), loss.regularisation.item()))
        return Loss(*(term.detach() for term in loss))

    def result(self, **settings: Any) -> Gates:
        """The gates as they are now, with how they were trained."""
        training = self.training
        about = {
            "lr": training.learning_rate,
            "reg_weight": training.regularisation,
            "num_steps": training.steps,
            "initial_value": 1.0,
            "supervision": "distill",
            "full_source": training.full_source,
        }
        return Gates(self.gates, sinks=training.sinks, recent=training.recent, settings={**about, **settings})

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on; the file is whole or not there."""
        state = {
            "training": asdict(self.training),
            "step": self.step,
            "history": self.history,
            "gates": self.gates.detach(),
            "optimiser": self.optimiser.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_bytes(state))

    def restore(self, path: Path) -> None:
        """Takes up the training that `save` wrote.

        Raises ValueError where the file is damaged, or is of a training with other options or of another model.
        """
        try:
            state = torch.load(path, map_location=self.model.device, weights_only=True)
            ours, theirs = asdict(self.training), state["training"]
            shape = tuple(state["gates"].shape)
        except Exception as error:
            raise ValueError(f"{path} is not a checkpoint of gate training ({type(error).__name__})") from None
        different = sorted(name for name in ours if ours[name] != theirs.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{path} was trained with {name} {theirs.get(name)}, got {ours[name]}; begin in another folder"
            )
        if shape != tuple(self.gates.shape):
            raise ValueError(f"{path} has gates of shape {shape}, the model needs {tuple(self.gates.shape)}")
        with torch.no_grad():
            self.gates.copy_(state["gates"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.history = state["step"], [tuple(row) for row in state["history"]]


def train_gates(
    model: PreTrainedModel,
    example: Callable[[int], Example],
    training: GateTraining,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 10,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, total: steps,
    report: Callable[[int, Loss], None] | None = None,
) -> GateTrainer:
    """The trainer after all steps; step i learns from `example(i)`, which must depend on nothing but i.

    With a `checkpoint`, the state is written there every so many steps, and a run that finds one goes on from it to
    the same gates as if it had never stopped.
    """
    trainer = GateTrainer(model, training)
    if checkpoint is not None and checkpoint.exists():
        trainer.restore(checkpoint)
    with frozen(model):
        for step in progress(range(trainer.step, training.steps), training.steps - trainer.step):
            loss = trainer.advance(example(step))
            if report is not None:
                report(step, loss)
            if checkpoint is not None and (trainer.step % checkpoint_every == 0 or trainer.step == training.steps):
                trainer.save(checkpoint)
    return trainer


@dataclass(frozen=True)
class PasskeyData:
    """The passkeys that gates learn from: several word sequences hidden in text, every one of them to be recited.

    The paper's are 10 of 32 words in 1,000 to 32,000 tokens; the defaults fit a small model on two cores.
    """

    context: int = 416
    """Tokens before the first question; with the questions and answers of the other defaults, about 512."""
    passkeys: int = 3
    """Passkeys hidden in every sequence."""
    words: int = 8
    """Words of a passkey."""
    batch: int = 1
    """Sequences in a step."""
    seed: int = 0
    """Of the passkeys, their depths and the text around them."""

    def example(self, haystack: Haystack, step: int) -> Example:
        """What one step learns from: it depends on the seed and the step alone."""
        return as_example(
            passkeys(
                haystack,
                self.batch,
                context=self.context,
                count=self.passkeys,
                words=self.words,
                seed=(self.seed << 32) + step,
                split="train",
            )
        )


def as_example(prompts: Sequence[Prompt]) -> Example:
    """The prompts as one batch, all questions and answers supervised, as in the released data code."""
    length = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    supervised = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        supervised[row, len(prompt.context) : len(prompt.tokens)] = True
    return Example(tokens, supervised)


SMALL = GateTraining(steps=60, learning_rate=0.05, sinks=8, recent=64)
"""What fits a model of 135M parameters and `PasskeyData()`: minutes on two cores."""


def fit_gates(model: PreTrainedModel, texts: Sequence[str], *, sinks: int, recent: int) -> Gates:
    """Gates trained by the small recipe on passkeys hidden in the texts, tokenised as the model's folder or id says."""
    from transformers import AutoTokenizer

    haystack = Haystack(AutoTokenizer.from_pretrained(model.name_or_path), "\n\n".join(texts))
    training = replace(SMALL, sinks=sinks, recent=recent)
    return train_gates(model, lambda step: PasskeyData().example(haystack, step), training).result()
