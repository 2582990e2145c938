"""Sequence mixers side by side: `regard bench mixers`. A mixer takes part by being in its room's `MIXERS`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard import papers
from regard.evidence.staleness import code_digest, digest
from regard.evidence.store import read_json, write_json
from regard.paper import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.blocks.sequence_mixer import SequenceMixer

BASELINE = "softmax"
"""The name of full softmax attention, which is no paper's room but what every mixer is compared with."""

TEXTS = {"text": "python_reference", "code": "standard_library"}
"""The built-in texts by what `data` calls them: functions of `regard.data.text`."""


@dataclass(frozen=True)
class MixerBench:
    """What is compared, and how long each is trained."""

    only: tuple[str, ...] = ()
    """Mixers to compare: softmax, a paper's slug, or another of its mixers as slug.name. All papers' when empty."""
    data: str = "text"
    """Text to train on: text (the Python reference), code (the standard library), or a path to .txt, .md, .jsonl."""
    steps: int = 500
    """Optimiser steps on text."""
    dim: int = 128
    """Numbers per token in every model."""
    layers: int = 2
    """Layers of the model of text, each with the mixer and a feed-forward net."""
    length: int = 256
    """Bytes of text in a training window."""
    batch: int = 16
    """Windows, or sequences for recall, in a training step."""
    learning_rate: float = 2e-3
    """Highest learning rate of the model of text."""
    recall_steps: int = 400
    """Optimiser steps on associative recall."""
    recall_pairs: int = 16
    """Key-value pairs to remember in a sequence."""
    recall_length: int = 64
    """Tokens in a sequence of associative recall."""
    recall_vocab: int = 128
    """Tokens there are in associative recall: half of them keys, half values."""
    recall_learning_rate: float = 5e-3
    """Highest learning rate on associative recall."""
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Lengths of text, in tokens, at which time and state are measured."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(not isinstance(n, str) and not (0 < n < math.inf) for n in numbers):
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.lengths:
            raise ValueError("lengths must name at least one length, got none")


@dataclass(frozen=True)
class MixerResult:
    """All that was measured of one mixer."""

    mixer: str
    parameters: int
    """Of the model of text."""
    text_curve: tuple[tuple[int, float], ...]
    """(step, validation bits per byte)"""
    text_seconds: float
    """Training on text took, its validation included."""
    recall_curve: tuple[tuple[int, float], ...]
    """(step, share of keys whose value was recalled)"""
    lengths: tuple[int, ...]
    forward: tuple[float, ...]
    """Seconds per token to read a text of each length, one layer."""
    decode: tuple[float, ...]
    """Seconds for one token after it."""
    state_bytes: tuple[int, ...]
    """Of the state after it, one sequence, one layer."""


def bench_mixers(options: MixerBench, run: Run) -> Path:
    """The file of results, `mixers.json` in the run's folder, with a picture of them beside it.

    Every mixer gets the same model around it, seed, batches, steps and optimiser. Results are written mixer by mixer:
    run again, the bench goes on where it stopped, and measures anew only what other settings or changed code ask for.
    Raises ValueError on an unknown mixer, on one that sees later tokens, and on data that do not fit the sizes.
    """
    from regard.data import text
    from regard.evidence.mixer_measurements import RecallTask, TextTask, Training, cost

    makers = find_mixers(options)
    source = getattr(text, TEXTS[options.data])() if options.data in TEXTS else text.read_texts(options.data)
    text_task = TextTask.of(source, options.length, options.batch)
    recall_task = RecallTask(options.recall_pairs, options.recall_length, options.recall_vocab, 2 * options.batch)
    recall_task.check()

    path = run.workdir / "mixers.json"
    basis = {**asdict(replace(options, only=())), "seed": run.seed, "device": run.device, "text": digest(source)}
    stored = read_json(path) if path.exists() else {}
    results: dict[str, Any] = stored.get("results", {}) if stored.get("settings") == _plain(basis) else {}
    for name, maker in makers.items():
        code = _code_of(name)
        if results.get(name, {}).get("code") == code:
            continue
        learnt = text_task.learn(
            maker, options.dim, options.layers, Training(options.steps, options.learning_rate), run, name
        )
        recall = recall_task.learn(
            maker, options.dim, Training(options.recall_steps, options.recall_learning_rate), run, name
        )
        costs = [cost(maker, options.dim, n, run) for n in run.progress(options.lengths, f"{name}: time and state")]
        result = MixerResult(
            mixer=name,
            parameters=learnt.parameters,
            text_curve=tuple(learnt.curve),
            text_seconds=learnt.seconds,
            recall_curve=tuple(recall),
            lengths=options.lengths,
            forward=tuple(c.forward for c in costs),
            decode=tuple(c.decode for c in costs),
            state_bytes=tuple(c.state_bytes for c in costs),
        )
        results[name] = {**asdict(result), "code": code}
        _write(path, basis, makers, results)
    _write(path, basis, makers, results)
    run.figure("mixers", draw(results_of(path)))
    return path


def find_mixers(options: MixerBench) -> dict[str, Callable[[int], SequenceMixer]]:
    """The maker of each mixer that is asked for; without `only`, softmax and the first mixer of every room.

    Raises ValueError, with the nearest name, where there is no such mixer, and where it is not causal.
    """
    import torch

    rooms = {paper.slug: paper for paper in papers.all() if "mixer" in paper.provides}
    found: dict[str, Callable[[int], SequenceMixer]] = {}
    for name in options.only or (BASELINE, *rooms):
        room = rooms.get(name.partition(".")[0])
        offered = _baseline() if name == BASELINE else {} if room is None else import_module(room.module).MIXERS
        if name not in offered:
            raise ValueError(_unknown(name, [*offered, BASELINE, *rooms]))
        with torch.random.fork_rng(devices=[]):  # a look at the mixer draws no numbers from the caller's generator
            exempt = "causality" in offered[name](options.dim).exempt
        if exempt and options.only:
            raise ValueError(f"only must name causal mixers, got {name!r}, whose tokens see later ones")
        if not exempt:
            found[name] = offered[name]
    return found


def _baseline() -> Mapping[str, Callable[[int], SequenceMixer]]:
    from regard.blocks.softmax_attention import SoftmaxAttention

    return {BASELINE: lambda dim: SoftmaxAttention(dim, num_heads=max(1, dim // 64))}


def _unknown(name: str, names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no mixer {name!r}{hint} (there are {', '.join(names)})"


def _code_of(name: str) -> str:
    """A hash of the code that the mixer can reach: its room, what rooms share, and the measurements."""
    house = Path(papers.__file__).parent.parent
    folders = [house / "attention", house / "blocks"]
    if name != BASELINE:
        folders.append(papers.get(name.partition(".")[0]).folder)
    return code_digest(Path(__file__).with_name("mixer_measurements.py"), *folders)


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _write(path: Path, settings: Mapping[str, Any], asked: Iterable[str], results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": settings, "shown": [name for name in asked if name in results], "results": results})


def results_of(path: Path) -> list[MixerResult]:
    """All that was measured of the mixers of the last run, in the order in which they were asked for."""
    content = read_json(path)
    found = []
    for name in content["shown"]:
        fields = {key: value for key, value in content["results"][name].items() if key != "code"}
        for key in ("text_curve", "recall_curve"):
            fields[key] = tuple((step, value) for step, value in fields[key])
        for key in ("lengths", "forward", "decode", "state_bytes"):
            fields[key] = tuple(fields[key])
        found.append(MixerResult(**fields))
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    """One row for each mixer of the last run: the end of training, and costs at the shortest and longest length."""
    return [_row(result) for result in results_of(path)]


def _row(result: MixerResult) -> dict[str, Any]:
    at = dict(zip(result.lengths, zip(result.forward, result.decode, result.state_bytes, strict=True), strict=True))
    row: dict[str, Any] = {
        "mixer": result.mixer,
        "parameters": result.parameters,
        "bits_per_byte": round(result.text_curve[-1][1], 4),
        "recall": round(result.recall_curve[-1][1], 4),
    }
    ends = sorted({min(at), max(at)})
    row |= {f"read_us_per_token_{n}": round(at[n][0] * 1e6, 2) for n in ends}
    row |= {f"decode_us_per_token_{n}": round(at[n][1] * 1e6, 1) for n in ends}
    return row | {f"state_bytes_{n}": at[n][2] for n in ends}


def draw(results: Sequence[MixerResult]) -> Figure:
    """The picture of a comparison: learning curves, recall, time per token and bytes of state against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (text, recall), (time, state) = figure.subplots(2, 2)
    for number, result in enumerate(results):
        colour = f"C{number}"
        text.plot(*zip(*result.text_curve, strict=True), color=colour, marker=".", label=result.mixer)
        recall.bar(result.mixer, result.recall_curve[-1][1], color=colour)
        time.loglog(result.lengths, [s * 1e6 for s in result.forward], color=colour, marker=".", label=result.mixer)
        time.loglog(result.lengths, [s * 1e6 for s in result.decode], color=colour, marker=".", linestyle=":")
        state.loglog(result.lengths, result.state_bytes, color=colour, marker=".", label=result.mixer)
    text.set(title="Text", xlabel="step", ylabel="validation bits per byte")
    recall.set(title="Associative recall", ylabel="share of keys recalled", ylim=(0, 1))
    time.set(title="Time: reading (solid), decoding (dotted)", xlabel="tokens", ylabel="µs per token, one layer")
    state.set(title="Memory", xlabel="tokens", ylabel="bytes of state, one layer")
    for panel in (text, time, state):
        panel.legend()
    return figure
