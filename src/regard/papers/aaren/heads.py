"""What the paper's four settings put around a causal stack: series classes, forecasts, events, decisions.

Each model takes Aaren or its host Transformer by name, `attention`, and is the same in every other part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, mse_loss, softplus

from regard.blocks.saving import Saved
from regard.papers.aaren.model import STACKS, CausalStack, StackConfig, StackState

Attention = Literal["aaren", "transformer"]


def _stack(config: StackConfig, attention: str) -> CausalStack:
    if attention not in STACKS:
        raise ValueError(f"attention must be 'aaren' or 'transformer', got {attention!r}")
    return STACKS[attention](config)


@dataclass(frozen=True)
class SeriesClassifierConfig(StackConfig):
    """The sizes of a classifier of time series."""

    features: int = 1
    """Values per time step."""
    classes: Sequence[str] = ("0", "1")
    """Their names, in the order of the logits."""
    columns: Sequence[str] = ()
    """The names of the values, where they have any, so that a file with its columns in another order reads the same."""
    attention: Attention = "aaren"
    """The mechanism of the stack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("classes", "columns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives a list back
        if self.columns and len(self.columns) != self.features:
            raise ValueError(f"columns must be as many as features, {self.features}, got {', '.join(self.columns)}")
        if self.features < 1 or len(self.classes) < 2:
            raise ValueError(f"features must be positive and classes two or more, got {self.features}, {self.classes}")


class SeriesClassifier(nn.Module, Saved, library_name="regard"):
    """The class of a series, read at its last time step.

    Source: "Attention as an RNN", section 4.4: a causal stack, cross entropy on the last token.
    """

    def __init__(self, config: SeriesClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("deviation", torch.ones(config.features))
        self.embed = nn.Linear(config.features, config.dim)
        self.stack = _stack(config, config.attention)
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, len(config.classes)))

    def forward(
        self, series: Float[Tensor, "batch time features"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch classes"]:
        """The logits of each series; what is behind its length is not read, because the stack is causal."""
        tokens, _ = self._tokens(series, None)
        return self.head(tokens[torch.arange(len(tokens), device=tokens.device), lengths - 1])

    def read(
        self, series: Float[Tensor, "batch time features"], state: StackState | None = None
    ) -> tuple[Float[Tensor, "batch time classes"], StackState]:
        """The logits after every time step of a series that comes in pieces of any length, and what to continue with.

        With Aaren a time step costs the same however long the series has become, in time and in memory.
        """
        tokens, state = self._tokens(series, state)
        return self.head(tokens), state

    def _tokens(self, series: Tensor, state: StackState | None) -> tuple[Tensor, StackState]:
        return self.stack(self.embed((series - self.mean) / self.deviation), state)

    def loss(
        self, series: Float[Tensor, "batch time features"], lengths: Int[Tensor, "batch"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """The cross entropy of the labels, in nats."""
        return cross_entropy(self(series, lengths), labels)


@dataclass(frozen=True)
class ForecasterConfig(StackConfig):
    """The sizes of a forecaster."""

    features: int = 1
    """Series that are forecast together."""
    horizon: int = 96
    """Time steps to forecast."""
    attention: Attention = "aaren"
    """The mechanism of the stack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1 or self.horizon < 1:
            raise ValueError(f"features and horizon must be positive, got {self.features} and {self.horizon}")


class Forecaster(nn.Module, Saved, library_name="regard"):
    """The next time steps of a window, each window in its own mean and deviation.

    Source: "Attention as an RNN", section 4.3: a Transformer with normalised input, mean squared error.
    """

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.features, config.dim)
        self.stack = _stack(config, config.attention)
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.horizon * config.features))

    def forward(self, window: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch horizon features"]:
        """The forecast, in the units of the window."""
        mean = window.mean(1, keepdim=True)
        deviation = (window.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        tokens, _ = self.stack(self.embed((window - mean) / deviation))
        return self.head(tokens[:, -1]).unflatten(-1, (self.config.horizon, -1)) * deviation + mean

    def loss(
        self, window: Float[Tensor, "batch time features"], target: Float[Tensor, "batch horizon features"]
    ) -> Float[Tensor, ""]:
        """The mean squared error of the forecast."""
        return mse_loss(self(window), target)


class NextEvent(NamedTuple):
    """What is expected after each event: when (a mixture of log-normals over the gap) and of which mark."""

    log_weights: Float[Tensor, "batch events components"]
    means: Float[Tensor, "batch events components"]
    deviations: Float[Tensor, "batch events components"]
    mark_logits: Float[Tensor, "batch events marks"]

    def log_density(self, gap: Float[Tensor, "batch events"]) -> Float[Tensor, "batch events"]:
        """The log density of the gap to the next event, a positive time."""
        normal = torch.distributions.Normal(self.means, self.deviations)
        log_gap = gap.log()
        return torch.logsumexp(self.log_weights + normal.log_prob(log_gap[..., None]), -1) - log_gap


@dataclass(frozen=True)
class EventModelConfig(StackConfig):
    """The sizes of a model of marked events in continuous time."""

    marks: int = 1
    """Kinds of event."""
    components: int = 8
    """Log-normal distributions in the mixture of the gap."""
    attention: Attention = "aaren"
    """The mechanism of the stack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.marks < 1 or self.components < 1:
            raise ValueError(f"marks and components must be positive, got {self.marks} and {self.components}")


class EventModel(nn.Module, Saved, library_name="regard"):
    """When the next event comes, and its mark, after each event of a sequence.

    Source: "Attention as an RNN", section 4.2: Transformer Hawkes Process with a log-normal mixture for the gap.
    """

    def __init__(self, config: EventModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_mark = nn.Embedding(config.marks, config.dim)
        self.embed_gap = nn.Linear(1, config.dim)
        self.stack = _stack(config, config.attention)
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, 3 * config.components + config.marks))

    def forward(self, gaps: Float[Tensor, "batch events"], marks: Int[Tensor, "batch events"]) -> NextEvent:
        """What is expected after each event, given the gap before it (a positive time), its mark, and those before."""
        return self.read(gaps, marks)[0]

    def read(
        self, gaps: Float[Tensor, "batch events"], marks: Int[Tensor, "batch events"], state: StackState | None = None
    ) -> tuple[NextEvent, StackState]:
        """The same for a sequence that comes in pieces of any length, and what to continue with."""
        tokens, state = self.stack(self.embed_mark(marks) + self.embed_gap(gaps.log()[..., None]), state)
        weights, means, deviations, mark_logits = self.head(tokens).split(
            [*[self.config.components] * 3, self.config.marks], -1
        )
        return NextEvent(log_softmax(weights, -1), means, softplus(deviations) + 1e-3, mark_logits), state

    def loss(
        self,
        gaps: Float[Tensor, "batch events"],
        marks: Int[Tensor, "batch events"],
        mask: Bool[Tensor, "batch events"],
    ) -> Float[Tensor, ""]:
        """The mean negative log-likelihood of an event given those before it, gap and mark, in nats.

        The first event of a sequence is given; events where `mask` is False (padding, at the end) do not count.
        Raises ValueError where a gap is not positive.
        """
        gaps = gaps.masked_fill(~mask, 1.0)
        if not bool((gaps > 0).all()):
            raise ValueError(f"gaps between events must be positive, got {gaps.min().item():g}")
        expected = self(gaps[:, :-1], marks[:, :-1])
        mark_loss = cross_entropy(expected.mark_logits.transpose(1, 2), marks[:, 1:], reduction="none")
        return (mark_loss - expected.log_density(gaps[:, 1:]))[mask[:, 1:]].mean()


@dataclass(frozen=True)
class DecisionModelConfig(StackConfig):
    """The sizes of a decision model (return-conditioned policy)."""

    state_dim: int = 17
    """Numbers that describe the state of the environment."""
    action_dim: int = 6
    """Numbers in an action."""
    max_steps: int = 1000
    """Length of an episode; each of its steps has a learned embedding."""
    attention: Attention = "aaren"
    """The mechanism of the stack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("state_dim", "action_dim", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class DecisionModel(nn.Module, Saved, library_name="regard"):
    """The action of each step, given the return still to come, the state, and the steps before.

    Source: "Attention as an RNN", section 4.1: Decision Transformer with its stack replaced, mean squared error.
    """

    def __init__(self, config: DecisionModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_return = nn.Linear(1, config.dim)
        self.embed_state = nn.Linear(config.state_dim, config.dim)
        self.embed_action = nn.Linear(config.action_dim, config.dim)
        self.embed_step = nn.Embedding(config.max_steps, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.stack = _stack(config, config.attention)
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.action_dim), nn.Tanh())

    def forward(
        self,
        returns: Float[Tensor, "batch steps"],
        states: Float[Tensor, "batch steps state_dim"],
        actions: Float[Tensor, "batch steps action_dim"],
        steps: Int[Tensor, "batch steps"],
    ) -> Float[Tensor, "batch steps action_dim"]:
        """The actions, each in [-1, 1]; an action given as input is seen by later steps only."""
        parts = (self.embed_return(returns[..., None]), self.embed_state(states), self.embed_action(actions))
        tokens = torch.stack(parts, 2) + self.embed_step(steps)[:, :, None]  # (batch, steps, 3, dim)
        mixed, _ = self.stack(self.norm(tokens).flatten(1, 2))
        return self.head(mixed.unflatten(1, (-1, 3))[:, :, 1])  # the token of the state

    def act(
        self,
        returns: Float[Tensor, "batch"],
        states: Float[Tensor, "batch state_dim"],
        steps: Int[Tensor, "batch"],
        last_action: Float[Tensor, "batch action_dim"] | None = None,
        memory: StackState | None = None,
    ) -> tuple[Float[Tensor, "batch action_dim"], StackState]:
        """The action of one step of an episode that is under way, and what to continue with.

        `last_action` is what was done in the step before, None in the first step.
        """
        step = self.embed_step(steps)
        tokens = [self.embed_return(returns[:, None]) + step, self.embed_state(states) + step]
        if last_action is not None:
            tokens.insert(0, self.embed_action(last_action) + self.embed_step(steps - 1))
        mixed, memory = self.stack(self.norm(torch.stack(tokens, 1)), memory)
        return self.head(mixed[:, -1]), memory

    def loss(
        self,
        returns: Float[Tensor, "batch steps"],
        states: Float[Tensor, "batch steps state_dim"],
        actions: Float[Tensor, "batch steps action_dim"],
        steps: Int[Tensor, "batch steps"],
        mask: Bool[Tensor, "batch steps"],
    ) -> Float[Tensor, ""]:
        """The mean squared error of the actions where `mask` is True."""
        return mse_loss(self(returns, states, actions, steps)[mask], actions[mask])
