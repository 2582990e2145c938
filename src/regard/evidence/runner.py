"""Measures a paper's claims over their seeds, and continues where an interrupted run stopped."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from regard.evidence.staleness import code_hashes
from regard.evidence.store import Evidence, SeedResult, check_measured, read_json, write_json
from regard.paper import Claim, Paper, Run

if TYPE_CHECKING:
    from rich.progress import Progress

PACKAGES = ("regard", "torch", "transformers", "numpy")
"""Whose versions a measurement depends on."""


@dataclass(frozen=True)
class Outcome:
    """What a run gave for one claim: the evidence, and the pictures by caption."""

    evidence: Evidence
    figures: dict[str, Path]


class UnknownClaim(LookupError):
    """The paper makes no claim of that name."""


def run_claims(
    paper: Paper,
    workdir: Path,
    only: Iterable[str] = (),
    seeds: int | None = None,
    device: str = "cpu",
    display: Progress | None = None,
) -> list[Outcome]:
    """What each claim of the paper measured, over its seeds or over `seeds` of them.

    Every result is written below `workdir` the moment it is there, in a folder named after all that it depends on (the
    code that the claim reaches, the versions, the device): a run that was killed continues with the seeds that are
    missing, and after a change of any of these it starts fresh. Claims of one seed share what they make by `run.once`.

    Raises UnknownClaim with the nearest name, and ValueError, naming claim, seed and key, where a measurement is not a
    finite number.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    claims = choose(paper, only)
    code, versions = code_hashes(paper), _versions()
    basis = json.dumps([code, versions, device], sort_keys=True)
    folder = workdir / paper.slug / hashlib.sha256(basis.encode()).hexdigest()[:12]
    counts = {claim.name: seeds or claim.seeds for claim in claims}
    results: dict[str, list[SeedResult]] = {claim.name: [] for claim in claims}
    bar = display.add_task(paper.slug, total=sum(counts.values())) if display else None
    for seed in range(max(counts.values())):
        shared: dict[str, Any] = {}
        for claim in claims:
            if seed >= counts[claim.name]:
                continue
            if display and bar is not None:
                display.update(bar, description=f"{paper.slug}: {claim.name}, seed {seed + 1}/{counts[claim.name]}")
            home = folder / folder_name(claim.name) / f"seed-{seed}"
            run = Run(seed=seed, workdir=home, device=device, display=display, shared=shared)
            results[claim.name].append(_measure_once(claim, run))
            if display and bar is not None:
                display.advance(bar)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        Outcome(
            evidence=Evidence(
                claim=claim.name,
                statement=claim.statement,
                published=claim.published,
                baseline=claim.baseline,
                holds=_verdict(claim, results[claim.name]),
                results=tuple(results[claim.name]),
                recorded_at=now,
                device=device,
                versions=versions,
                code=code,
            ),
            figures=_figures(folder / folder_name(claim.name)),
        )
        for claim in claims
    ]


def choose(paper: Paper, only: Iterable[str] = ()) -> Sequence[Claim]:
    """The paper's claims, or those of these names in the paper's order."""
    claims = paper.claims()
    if not claims:
        raise UnknownClaim(f"{paper.slug} makes no claim that can be run")
    folders = [folder_name(claim.name) for claim in claims]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{paper.slug}: two claims have the same name: {', '.join(sorted(folders))}")
    wanted, names = list(only), [claim.name for claim in claims]
    for name in wanted:
        if name not in names:
            near = get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownClaim(f"{paper.slug} makes no claim {name!r}{hint} (its claims: {', '.join(names)})")
    return [claim for claim in claims if not wanted or claim.name in wanted]


def folder_name(claim: str) -> str:
    """The claim's name as a folder may be called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", claim).strip("-.") or "claim"


def _measure_once(claim: Claim, run: Run) -> SeedResult:
    """The seed's result: read where it is there already, else measured and written."""
    path = run.workdir / "result.json"
    if path.exists():
        stored = read_json(path)
        return SeedResult(stored["seed"], check_measured(claim.name, run.seed, stored["measured"]), stored["seconds"])
    run.workdir.mkdir(parents=True, exist_ok=True)
    _seed_generators(run.seed)
    start = time.perf_counter()
    measured = check_measured(claim.name, run.seed, claim.measure(run))
    result = SeedResult(run.seed, measured, seconds=round(time.perf_counter() - start, 3))
    write_json(path, asdict(result))
    return result


def _verdict(claim: Claim, results: Sequence[SeedResult]) -> bool:
    keys = [sorted(result.measured) for result in results]
    for result, found in zip(results, keys, strict=True):
        if found != keys[0]:
            raise ValueError(
                f"claim {claim.name!r}, seed {result.seed}: every seed must measure {', '.join(keys[0])}, "
                f"got {', '.join(found)}"
            )
    return bool(claim.holds([dict(result.measured) for result in results]))


def _seed_generators(seed: int) -> None:
    """Gives a claim the same global generators whether or not others ran before it."""
    random.seed(seed)
    seeders: dict[str, Callable[[Any], object]] = {
        "numpy": lambda numpy: numpy.random.seed(seed),
        "torch": lambda torch: torch.manual_seed(seed),
    }
    for name, seeder in seeders.items():
        if name in sys.modules:  # what the claim's module did not import, it does not draw from
            seeder(sys.modules[name])


def _figures(folder: Path) -> dict[str, Path]:
    """The pictures of a claim by name, the first seed's first."""
    paths = sorted(folder.glob("seed-*/figures/*.png"), key=lambda path: (int(path.parts[-3][5:]), path.name))
    several = len({path.parts[-3] for path in paths}) > 1
    return {f"{p.stem}, {p.parts[-3].replace('-', ' ')}" if several else p.stem: p for p in paths}


def _versions() -> dict[str, str]:
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not installed here
            continue
    return found
