"""What `regard run aaren` measures: are the forms one function, what does a token cost, and is accuracy comparable?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from regard.attention.merge import Partial, merge
from regard.attention.scan import Running, associative_scan, prefix_attention
from regard.attention.tree import tree_bytes
from regard.data.timeseries import BUNDLED, SeriesSet, bundled
from regard.paper import Claim, Run
from regard.papers.aaren.heads import Attention, Forecaster, ForecasterConfig, SeriesClassifier, SeriesClassifierConfig
from regard.papers.aaren.model import STACKS, AarenStack, CausalStack, StackConfig, StackState
from regard.papers.aaren.training import Training, fit, make_classifier, score

MODELS: tuple[Attention, ...] = ("aaren", "transformer")
COLOURS = {"aaren": "tab:blue", "transformer": "tab:orange"}
STACK = StackConfig(dim=64, num_layers=2, num_heads=4, feedforward=128)
"""Of both stacks that a stream is fed to."""
SIZES = replace(STACK, positions="sinusoid")
"""Of both models that are trained."""

LENGTHS, SCALES = (1, 7, 64, 257), (1.0, 30.0)
WINDOW, BLOCK, ROUNDS = 512, 64, 3
"""Tokens that are timed at either end of a stream; tokens after which the models take turns; how often."""
SHORT, LONG = 4096, 16384
"""Tokens of a stream."""

SERIES, INPUT, HORIZON, NOISE = 4000, 96, 24, 0.2
STEPS, BATCH = 300, 32
"""Of the forecasters' training."""


def measure_exactness(run: Run) -> dict[str, float]:
    """The largest differences of the forms of one attention from its definition, over lengths and scales."""
    generator = torch.Generator().manual_seed(run.seed)
    off = {"scan": 0.0, "tree_scan": 0.0, "recurrent": 0.0}
    for length in run.progress(LENGTHS, "lengths"):
        for scale in SCALES:
            scores = (scale * torch.randn(2, 4, length, generator=generator)).to(run.device)
            values = torch.randn(2, 4, length, 16, generator=generator).to(run.device)
            right = naive_prefix_softmax(scores.double(), values.double())
            forms = {
                "scan": prefix_attention(scores, values)[0],
                "tree_scan": associative_scan(merge, Partial(values, scores), dim=2).out,
                "recurrent": torch.cat(list(step_by_step(scores, values)), dim=2),
            }
            off = {name: max(off[name], (form - right).abs().max().item()) for name, form in forms.items()}
    return {f"{name}_off": each for name, each in off.items()}


def naive_prefix_softmax(
    scores: Float[Tensor, "batch heads tokens"], values: Float[Tensor, "batch heads tokens dim"]
) -> Float[Tensor, "batch heads tokens dim"]:
    """Attention at every prefix by the definition: a softmax for each, O(tokens^2)."""
    tokens = scores.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
    rows = scores[..., None, :].expand(*scores.shape, tokens)
    return rows.masked_fill(later, -torch.inf).softmax(-1) @ values


def step_by_step(scores: Tensor, values: Tensor) -> Iterator[Tensor]:
    """Attention at every prefix by the recurrence, a token at a time."""
    state: Running | None = None
    for token in range(scores.shape[-1]):
        read, state = prefix_attention(scores[..., token : token + 1], values[..., token : token + 1, :], state)
        yield read


class Window(NamedTuple):
    """Median seconds per token over the first and the last tokens of a stream."""

    first: float
    last: float

    @property
    def ratio(self) -> float:
        """How many times as long a token takes at the end."""
        return self.last / self.first


class Streams(NamedTuple):
    """What two models needed for one stream, by model."""

    seconds: dict[str, list[float]]
    """Of every token."""
    held: dict[str, list[int]]
    """Bytes of the layers' state after every token."""
    windows: dict[int, dict[str, Window]]
    """By length of the stream."""


@torch.inference_mode()
def stream(run: Run) -> Streams:
    """Feeds both models one stream of `LONG` tokens, token by token, in turns of `BLOCK` tokens.

    The first tokens are timed once more beside the last ones, in turns, so that both see the same machine.
    """
    torch.manual_seed(run.seed)
    models: dict[str, CausalStack] = {name: STACKS[name](STACK).to(run.device).eval() for name in MODELS}
    tokens = torch.randn(1, LONG, STACK.dim, device=run.device)
    states: dict[str, StackState] = {name: model.initial(1) for name, model in models.items()}
    for name, model in models.items():  # the first calls of a process are slow
        _timed(model, tokens[:, :BLOCK], states[name])
    streams = Streams({name: [] for name in MODELS}, {name: [] for name in MODELS}, {})
    for start in run.progress(range(0, LONG, BLOCK), "streaming"):
        if start + WINDOW in (SHORT, LONG):
            streams.windows[start + WINDOW] = _windows(models, tokens, states, start)
        for name, model in models.items():
            for token in range(start, start + BLOCK):
                seconds, states[name] = _timed(model, tokens[:, token : token + 1], states[name])
                streams.seconds[name] += seconds
                streams.held[name].append(tree_bytes(states[name].layers))
    return streams


def _windows(
    models: Mapping[str, CausalStack], tokens: Tensor, states: Mapping[str, StackState], start: int
) -> dict[str, Window]:
    seconds: dict[tuple[str, int], list[float]] = {(name, begin): [] for name in models for begin in (0, start)}
    for _ in range(ROUNDS):
        now = {(name, begin): models[name].initial(1) if begin == 0 else states[name] for name, begin in seconds}
        for offset in range(0, WINDOW, BLOCK):
            for (name, begin), state in now.items():
                some = tokens[:, begin + offset : begin + offset + BLOCK]
                took, now[name, begin] = _timed(models[name], some, state)
                seconds[name, begin] += took
    return {name: Window(median(seconds[name, 0]), median(seconds[name, start])) for name in models}


def _timed(model: CausalStack, tokens: Tensor, state: StackState) -> tuple[list[float], StackState]:
    """Seconds for each of the tokens, fed one by one, and the state after them."""
    seconds = []
    for token in tokens.split(1, dim=1):
        begin = time.perf_counter()
        _, state = model(token, state)
        if tokens.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds, state


def _streams(run: Run) -> Streams:
    return run.once("aaren: streams", lambda: stream(run))


def measure_stream(run: Run, length: int) -> dict[str, float]:
    """Time per token at both ends of a stream of that length, and bytes of state."""
    streams = _streams(run)
    run.figure("time_per_token", draw_stream(streams, length))
    measured: dict[str, float] = {}
    for name, window in streams.windows[length].items():
        held = streams.held[name]
        measured |= {
            f"{name}_time_ratio": window.ratio,
            f"{name}_first_us": 1e6 * window.first,
            f"{name}_last_us": 1e6 * window.last,
            f"{name}_bytes_first": held[0],
            f"{name}_bytes_last": held[length - 1],
        }
    return measured


def flat_and_growing(seeds: Sequence[Mapping[str, float]], length: int) -> bool:
    """The rule of both streaming claims."""
    aaren, transformer = (median(seed[f"{name}_time_ratio"] for seed in seeds) for name in MODELS)
    constant = all(seed["aaren_bytes_last"] == seed["aaren_bytes_first"] for seed in seeds)
    proportional = all(seed["transformer_bytes_last"] == length * seed["transformer_bytes_first"] for seed in seeds)
    return aaren <= 1.2 and transformer >= 2 and constant and proportional


def measure_accuracy(run: Run) -> dict[str, float]:
    """Test accuracy of both models on every bundled set, trained alike."""
    measured: dict[str, float] = {}
    for name in run.progress(BUNDLED, "series sets"):
        train, test = bundled(name)
        for attention in MODELS:
            model = _classifier(run, name, train, attention)
            measured[f"{attention}_{name}"] = score(model, test).accuracy
            if name == "GunPoint" and attention == "aaren":
                run.figure("what_the_query_reads", draw_reading(model, test))
    run.figure("accuracy", draw_accuracy(measured))
    means = {attention: mean(measured[f"{attention}_{name}"] for name in BUNDLED) for attention in MODELS}
    measured |= {f"{attention}_mean": value for attention, value in means.items()}
    return measured | {"difference": means["aaren"] - means["transformer"]}


def _classifier(run: Run, name: str, train: SeriesSet, attention: Attention) -> SeriesClassifier:
    sizes: dict[str, Any] = {**vars(SIZES), "features": train.series.shape[2], "classes": train.classes}
    config = SeriesClassifierConfig(**sizes, attention=attention)
    model = make_classifier(config, train, run.seed).to(run.device)
    fit(
        model,
        train,
        Training(),
        seed=run.seed,
        progress=lambda steps, total: run.progress(steps, f"{name}, {attention}", total),
    )
    return model


def comparable_accuracy(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the accuracy claim, on means over the seeds."""
    italy = [mean(seed[f"{attention}_ItalyPowerDemand"] for seed in seeds) for attention in MODELS]
    return mean(seed["difference"] for seed in seeds) >= -0.03 and min(italy) >= 0.85


def sinusoids(seed: int) -> Float[Tensor, "time 1"]:
    """A sum of five sinusoids of random periods, amplitudes and phases, and white noise."""
    generator = torch.Generator().manual_seed(seed)
    period, amplitude, phase = torch.rand(3, 5, 1, generator=generator)
    when = torch.arange(SERIES)
    waves = (0.5 + amplitude) * torch.sin(2 * torch.pi * (when / (8 + 40 * period) + phase))
    return (waves.sum(0) + NOISE * torch.randn(SERIES, generator=generator))[:, None]


def measure_forecasts(run: Run) -> dict[str, float]:
    """Mean squared errors of both models on the last 30% of a series, trained alike on the first 70%."""
    series = sinusoids(run.seed)
    windows = series.unfold(0, INPUT + HORIZON, 1).mT  # (window, time, features)
    edge = round(0.7 * SERIES)
    train, test = windows[: edge - INPUT - HORIZON + 1], windows[edge:]
    flat = test[:, :INPUT].mean(1, keepdim=True)
    measured = {"window_mean_mse": (flat - test[:, INPUT:]).square().mean().item(), "noise_mse": NOISE**2}
    forecasts = {}
    for attention in MODELS:
        model = _forecaster(run, train, attention)
        with torch.no_grad():
            parts = [model(some.to(run.device)).cpu() for some in test[:, :INPUT].split(256)]
        forecasts[attention] = torch.cat(parts)
        measured[f"{attention}_mse"] = (forecasts[attention] - test[:, INPUT:]).square().mean().item()
    run.figure("forecasts", draw_forecasts(test[-1], {name: each[-1] for name, each in forecasts.items()}))
    return measured


def _forecaster(run: Run, train: Float[Tensor, "windows time features"], attention: Attention) -> Forecaster:
    torch.manual_seed(run.seed)
    model = Forecaster(ForecasterConfig(**vars(SIZES), horizon=HORIZON, attention=attention)).to(run.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in run.progress(range(STEPS), f"forecaster, {attention}"):
        some = train[torch.randint(len(train), (BATCH,))].to(run.device)
        optimiser.zero_grad()
        model.loss(some[:, :INPUT], some[:, INPUT:]).backward()
        optimiser.step()
    return model.eval()


def comparable_forecasts(seeds: Sequence[Mapping[str, float]]) -> bool:
    """The rule of the forecasting claim, on means over the seeds."""
    aaren, transformer = (mean(seed[f"{attention}_mse"] for seed in seeds) for attention in MODELS)
    return aaren <= 1.1 * transformer and max(aaren, transformer) <= mean(s["window_mean_mse"] for s in seeds) / 2


def draw_stream(streams: Streams, length: int) -> Figure:
    """Time per token (medians of a turn) and bytes of state, against the position in the stream."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    for name in MODELS:
        seconds, held = streams.seconds[name][:length], streams.held[name][:length]
        turns = [median(seconds[start : start + BLOCK]) * 1e6 for start in range(0, length, BLOCK)]
        times.plot(range(0, length, BLOCK), turns, color=COLOURS[name], label=name)
        sizes.semilogy(range(1, length + 1), held, color=COLOURS[name], label=name)
    times.set(xlabel="token", ylabel="µs per token", title=f"{STACK.num_layers} layers of {STACK.dim}, token by token")
    times.set_ylim(bottom=0)
    sizes.set(xlabel="token", ylabel="bytes of state", title="what the layers keep of the stream")
    times.legend()
    return figure


def draw_accuracy(measured: Mapping[str, float]) -> Figure:
    """Test accuracy per set as bars, the two models side by side."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, attention in enumerate(MODELS):
        at = [index + 0.4 * place for index in range(len(BUNDLED))]
        bars = axes.bar(
            at, [measured[f"{attention}_{name}"] for name in BUNDLED], 0.38, color=COLOURS[attention], label=attention
        )
        axes.bar_label(bars, fmt="%.2f")
    axes.set_xticks([index + 0.2 for index in range(len(BUNDLED))], BUNDLED)
    axes.set(ylabel="test accuracy", ylim=(0, 1.15))
    axes.legend(loc="upper right", ncols=2)
    return figure


def draw_reading(model: SeriesClassifier, test: SeriesSet) -> Figure:
    """One series of each class, and the weights with which each layer's query reads it, head by head."""
    assert isinstance(model.stack, AarenStack) and test.labels is not None
    figure = Figure(figsize=(10, 5), layout="constrained")
    layers = model.config.num_layers
    grid = figure.subplots(1 + layers, len(test.classes), squeeze=False, sharex=True)
    for column, name in enumerate(test.classes):
        series = test[(test.labels == column).nonzero()[:1, 0]].series.to(model.mean)
        weights = model.stack.weights(model.embed((series - model.mean) / model.deviation))[:, 0].cpu()
        grid[0, column].plot(series[0].cpu())
        grid[0, column].set_title(f"a series of class {name}")
        for layer in range(layers):
            axes = grid[1 + layer, column]
            image = axes.imshow(weights[layer].numpy(), aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
            axes.set(ylabel=f"layer {layer + 1}\nhead", yticks=range(model.config.num_heads))
            figure.colorbar(image, ax=axes)
        grid[-1, column].set_xlabel("time step")
    return figure


def draw_forecasts(window: Float[Tensor, "time 1"], forecasts: Mapping[str, Float[Tensor, "horizon 1"]]) -> Figure:
    """The last window of the series, and what both models make of its end."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(window[:, 0], color="gray", label="series")
    for name, forecast in forecasts.items():
        axes.plot(range(INPUT, INPUT + HORIZON), forecast[:, 0], color=COLOURS[name], label=name)
    axes.axvline(INPUT - 0.5, color="black", linewidth=0.5)
    axes.set(xlabel="time step")
    axes.legend(loc="upper left", ncols=3)
    return figure


def _stream_claim(name: str, length: int, aside: str) -> Claim:
    return Claim(
        name=name,
        statement=(
            f"Streaming {length:,} tokens one by one through 2 layers of width 64 (4 heads, feed-forward 128){aside}: "
            "the median time of Aaren's last 512 tokens is at most 1.2 times that of its first 512, and its state has "
            "the same bytes after every token; the Transformer's with a KV cache is at least 2 times, and its bytes "
            "are proportional to the tokens. Ratios are medians over the seeds."
        ),
        published="constant memory and linear cumulative time, against linear memory and quadratic time",
        baseline="the causal Transformer of the same sizes, its keys and values written into a preallocated buffer",
        measure=lambda run: measure_stream(run, length),
        holds=lambda seeds: flat_and_growing(seeds, length),
        seeds=3,
        minutes=1.0,
    )


CLAIMS = [
    Claim(
        name="one function in three forms",
        statement=(
            "Scan, recurrence and naive prefix softmax (O(N^2), in fp64) differ by at most 1e-5 in fp32, for N in "
            "{1, 7, 64, 257}, with scores of deviation 1 and of 30."
        ),
        published="Aaren's outputs can be computed by a parallel prefix scan or updated token by token (section 3)",
        baseline="one softmax per prefix, in fp64",
        measure=measure_exactness,
        holds=lambda seeds: all(off <= 1e-5 for seed in seeds for off in seed.values()),
        seeds=3,
        minutes=0.1,
    ),
    _stream_claim("flat cost per token", SHORT, ""),
    _stream_claim("flat cost per token, longer stream", LONG, ", the same models as for 4,096 tokens"),
    Claim(
        name="accuracy comparable to the Transformer",
        statement=(
            "On ItalyPowerDemand, GunPoint, ArrowHead, BasicMotions and JapaneseVowels, split as shipped and "
            "z-normalised, with the same sizes for both (width 64, 2 layers, 4 heads, feed-forward 128, sinusoidal "
            "positions, dropout 0.1, logits of the last token) and the same training (AdamW 1e-3, batches of 16, 60 "
            "epochs), mean test accuracy over sets and seeds is at most 0.03 below the causal Transformer's, and both "
            "reach 0.85 on ItalyPowerDemand."
        ),
        published="comparable to Transformers on 38 data sets in four settings, error bars overlapping",
        baseline="the causal Transformer of the same sizes and training",
        measure=measure_accuracy,
        holds=comparable_accuracy,
        seeds=3,
        minutes=2.0,
    ),
    Claim(
        name="forecasts comparable to the Transformer's",
        statement=(
            "On a sum of five sinusoids and noise (4,000 steps, the last 30% for the test; 96 steps in, 24 out), with "
            "the sizes of the accuracy claim, instance normalisation and 300 steps of AdamW 1e-3 in batches of 32, the "
            "mean squared error over the seeds is at most 1.1 times the causal Transformer's, and both are at most "
            "half that of the window's mean."
        ),
        published="comparable to Transformers on 8 forecasting sets, error bars overlapping",
        baseline="the causal Transformer of the same sizes and training; the mean of the window",
        measure=measure_forecasts,
        holds=comparable_forecasts,
        seeds=3,
        minutes=0.7,
    ),
]
