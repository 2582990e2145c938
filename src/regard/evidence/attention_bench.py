"""Ways of attention side by side, time against length: `regard bench attention`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from regard.evidence.staleness import code_digest
from regard.evidence.store import read_json, write_json
from regard.evidence.timing import in_turn, ratio
from regard.paper import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

WAYS = {
    "sdpa": "PyTorch's scaled_dot_product_attention, causal",
    "attend": "regard's attend, causal",
    "sdpa_window": "scaled_dot_product_attention with a window as a dense boolean mask",
    "attend_window": "attend with the same window as a Mask: blocks that it hides are left out",
    "linear": "linear_attention with Taylor features, as in Based",
    "prefix": "prefix_attention: softmax at every prefix for one query per head, as in Aaren",
}
"""What is compared. All are causal; the first is what the others are held against."""


@dataclass(frozen=True)
class AttentionBench:
    """What is compared, and at which sizes."""

    only: tuple[str, ...] = ()
    """Ways to compare: sdpa, attend, sdpa_window, attend_window, linear, prefix. All when empty."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Numbers of tokens: as many queries as keys."""
    batch: int = 1
    """Sequences at a time."""
    heads: int = 8
    """Heads of queries, keys and values."""
    dim: int = 64
    """Numbers per head."""
    window: int = 256
    """Keys that a query sees through a window, itself included."""
    feature_dim: int = 16
    """Numbers of each query and key that linear attention makes its 1 + d + d^2 features of."""
    backward: bool = False
    """Also measure forward and backward together."""
    rounds: int = 7
    """Calls of each way at each length; the ways take turns."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if name not in ("only", "backward") and any(n < 1 for n in numbers):
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.lengths:
            raise ValueError("lengths must name at least one length, got none")
        if self.feature_dim > self.dim:
            raise ValueError(f"feature_dim must be at most dim, got {self.feature_dim} of {self.dim}")
        for way in self.only:
            if way not in WAYS:
                near = difflib.get_close_matches(way, WAYS, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"no way of attention {way!r}{hint} (there are {', '.join(WAYS)})")

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that are compared, each once."""
        return tuple(dict.fromkeys(self.only or WAYS))


def bench_attention(options: AttentionBench, run: Run) -> Path:
    """The file of results, `attention.json` in the run's folder, with a picture of them beside it.

    Only what took turns is comparable, so a length is measured for all ways at once, and written when it is done. Run
    again, the bench goes on where it stopped, and measures anew only the lengths that lack one of the ways, or that
    were measured with other sizes, threads, versions or code.
    """
    import torch

    sizes = {name: value for name, value in asdict(options).items() if name not in ("only", "lengths")}
    machine = {"device": run.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings = {**sizes, **machine, "seed": run.seed, "code": _code()}

    path = run.workdir / "attention.json"
    stored = read_json(path) if path.exists() else {}
    results: dict[str, Any] = stored.get("results", {}) if stored.get("settings") == settings else {}
    lengths = sorted(set(options.lengths))

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = [tokens for tokens in lengths if _has(results, tokens, options.ways)]
        write_json(path, {"settings": settings, "ways": options.ways, "lengths": done, "results": results})

    for tokens in run.progress(lengths, "lengths"):
        if not _has(results, tokens, options.ways):
            results[str(tokens)] = _measured(options, tokens, run)
            write()
    write()
    run.figure("attention", draw(path))
    return path


def ways_at(options: AttentionBench, tokens: int, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Each way as a function of query, key and value, all (batch, heads, tokens, dim)."""
    from torch.nn.functional import scaled_dot_product_attention

    from regard.attention.attend import attend
    from regard.attention.linear import Taylor, linear_attention
    from regard.attention.masks import causal, window
    from regard.attention.scan import prefix_attention

    taylor, first = Taylor(options.feature_dim), slice(options.feature_dim)
    all_ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        "attend": lambda q, k, v: attend(q, k, v, mask=causal()),
        "attend_window": lambda q, k, v: attend(q, k, v, mask=window(options.window)),
        "linear": lambda q, k, v: linear_attention(q[..., first], k[..., first], v, feature_map=taylor)[0],
        "prefix": lambda q, k, v: prefix_attention((k @ q[:, :, 0, :, None])[..., 0] * options.dim**-0.5, v)[0],
    }
    if "sdpa_window" in options.ways:  # made once, outside of what is timed, as `attend` does
        dense = window(options.window).tensor(tokens, tokens, device=device)
        all_ways["sdpa_window"] = lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense)
    return {name: all_ways[name] for name in options.ways}


def _measured(options: AttentionBench, tokens: int, run: Run) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round of every way, forward and, where asked for, with backward."""
    import torch

    generator = torch.Generator().manual_seed(run.seed)
    shape = (options.batch, options.heads, tokens, options.dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(run.device) for _ in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    ways = ways_at(options, tokens, run.device)

    def and_back(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(way(*leaves), leaves, grad)

    forward = {name: partial(way, q, k, v) for name, way in ways.items()}
    with torch.no_grad():
        measured = {"forward": in_turn(forward, options.rounds, run, f"{tokens} tokens")}
    if options.backward:
        backward = {name: partial(and_back, way) for name, way in ways.items()}
        measured["backward"] = in_turn(backward, options.rounds, run, f"{tokens} tokens, with backward")
    return measured


def _has(results: Mapping[str, Any], tokens: int, ways: Sequence[str]) -> bool:
    """Whether that length was measured for all of these ways."""
    return str(tokens) in results and set(ways) <= set(results[str(tokens)]["forward"])


def _code() -> str:
    """A hash of the code that is measured, and of this file."""
    here = Path(__file__)
    return code_digest(here, here.parents[1] / "attention")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """One row for each way of the last run: milliseconds at each length, and how much faster than the first way.

    `times_faster` is at the longest length, the median of the rounds' ratios.
    """
    content = read_json(path)
    ways, lengths, results = content["ways"], content["lengths"], content["results"]
    passes = [name for name in ("forward", "backward") if all(name in results[str(n)] for n in lengths)]
    rows = []
    for way in ways:
        row: dict[str, Any] = {"way": way}
        for name in passes:
            unit = "ms" if name == "forward" else "with_backward_ms"
            row |= {f"{unit}_{n}": _significant(1e3 * median(results[str(n)][name][way])) for n in lengths}
            if lengths:
                faster = ratio(results[str(lengths[-1])][name], ways[0], way)
                row["times_faster" if name == "forward" else "with_backward_times_faster"] = _significant(faster)
        rows.append(row)
    return rows


def _significant(value: float, digits: int = 4) -> float:
    return round(value, digits - 1 - math.floor(math.log10(value)))


def draw(path: Path) -> Figure:
    """The picture of a comparison: time against length, on logarithmic axes, forward and with backward."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    content = read_json(path)
    lengths, results = content["lengths"], content["results"]
    titles = {"forward": "Forward", "backward": "Forward and backward"}
    passes = [name for name in titles if name == "forward" or content["settings"]["backward"]]
    figure = Figure(figsize=(6.5 * len(passes), 5), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(passes), squeeze=False).flat, passes, strict=True):
        for way in content["ways"]:
            milliseconds = [1e3 * median(results[str(tokens)][name][way]) for tokens in lengths]
            panel.loglog(lengths, milliseconds, marker=".", label=way)
        panel.set(title=titles[name], xlabel="tokens", ylabel="ms per call")
        panel.set_xticks(lengths, [str(tokens) for tokens in lengths])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.legend()
    return figure
