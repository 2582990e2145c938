"""Attention weights of a running model, by module name, for pictures and analyses.

While nothing records, `attend` pays for one look at a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_current: ContextVar[Recording | None] = ContextVar("recording", default=None)


class Recording:
    """What was attended to while it was on."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.patterns = patterns
        self.calls: dict[str, list[Float[Tensor, "batch heads queries keys"]]] = {}
        """The weights of every call of `attend`, in order, by the name of the innermost module that made it."""
        self._running: list[str] = []

    @property
    def weights(self) -> dict[str, Float[Tensor, "batch heads queries keys"]]:
        """The weights of each module's last call."""
        return {name: calls[-1] for name, calls in self.calls.items()}

    @property
    def name(self) -> str:
        """Of the innermost module that is running; `attend` outside of any, '' in the model itself."""
        return self._running[-1] if self._running else "attend"

    def wants(self) -> bool:
        """Whether the weights of the module that is running are asked for."""
        return not self.patterns or any(fnmatchcase(self.name, pattern) for pattern in self.patterns)

    def keep(self, weights: Float[Tensor, "batch heads queries keys"]) -> None:
        """Add the weights of one call of the module that is running."""
        self.calls.setdefault(self.name, []).append(weights.detach())


@contextmanager
def record(model: nn.Module | None = None, *patterns: str) -> Iterator[Recording]:
    """A recording of the attention weights of everything that calls `attend` within the block.

    With a model, weights are filed under the name of the innermost of its modules that is running; patterns such as
    `"layers.*.attn"` choose some of them, and the others keep their fast path. Recorded calls compute their weights in
    full: memory and time grow with queries times keys. Without a model, all calls are filed under `attend`.

        with record(model, "layers.0.*") as recording:
            model(tokens)
        attention_map(recording.weights["layers.0.attn"][0])

    The model is as before after the block, also after an exception. Raises ValueError where a pattern fits no module.
    """
    modules = dict(model.named_modules()) if model is not None else {"attend": None}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"no module is called {pattern!r}; the model has {', '.join(filter(None, modules))}")
    recording = Recording(patterns)

    def enter(name: str, *_: Any) -> None:
        if _current.get() is recording:
            recording._running.append(name)

    def leave(*_: Any) -> None:
        if _current.get() is recording and recording._running:
            recording._running.pop()

    handles = []
    token = _current.set(recording)
    try:
        for name, module in modules.items():
            if module is not None:
                handles.append(module.register_forward_pre_hook(partial(enter, name)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        yield recording
    finally:
        _current.reset(token)
        for handle in handles:
            handle.remove()


def wanted() -> Recording | None:
    """The recording to keep the weights of this call in; None where none is asked for."""
    recording = _current.get()
    return recording if recording is not None and recording.wants() else None


def attention_map(
    weights: Float[Tensor, "heads queries keys"] | Float[Tensor, "queries keys"], labels: Sequence[str] | None = None
) -> Figure:
    """A picture of who attends to whom, one panel per head, queries downwards and keys to the right.

    `labels` names the keys, and the queries as the last of them. Raises ValueError where the shape or the number of
    labels does not fit.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if weights.ndim not in (2, 3):
        raise ValueError(f"weights must be (queries, keys) or (heads, queries, keys), got {tuple(weights.shape)}")
    panels = weights.detach().float().cpu().reshape(-1, *weights.shape[-2:])
    queries, keys = panels.shape[1:]
    if labels is not None and (len(labels) != keys or queries > keys):
        raise ValueError(f"labels must name all {keys} keys, and no more queries than keys, got {len(labels)} labels")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 3.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for head, panel in enumerate(panels):
        axis = axes[head]
        image = axis.imshow(panel.numpy(), cmap="magma_r", vmin=0, vmax=float(panels.max()), aspect="auto")
        axis.set_title(f"head {head}" if weights.ndim == 3 else "weights", fontsize=9)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        if labels is not None:
            step = -(-keys // 40)  # more than 40 cannot be read
            across = range(0, keys, step)
            axis.set_xticks(across, [labels[key] for key in across], rotation=90, fontsize=6)
            down = range(0, queries, step)
            axis.set_yticks(down, [labels[keys - queries + query] for query in down], fontsize=6)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=figure.axes[: len(panels)], label="weight", shrink=0.8)
    return figure
