"""Times that can be compared: calls that take turns in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

from regard.paper import Run

T = TypeVar("T")


def timed(call: Callable[[], T], device: str = "cpu") -> tuple[float, T]:
    """The seconds that the call took on the device, and its result."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - start, result


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, run: Run, description: str = ""
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, after one round that does not count.

    The calls take turns, and each second round runs backwards: what slows the machine for a while slows them alike.
    """
    forth = list(calls)
    order = forth + [name for odd in range(rounds) for name in forth[:: -1 if odd % 2 else 1]]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in run.progress(order, description):
        seconds[name].append(timed(calls[name], run.device)[0])
    return {name: times[1:] for name, times in seconds.items()}


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """How many times as long as the other the one takes: the median of the rounds' ratios."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def _wait(device: str) -> None:
    """Until the device has done what it was given: accelerators work behind the caller's back."""
    if device != "cpu":
        import torch

        torch.accelerator.synchronize(device)
