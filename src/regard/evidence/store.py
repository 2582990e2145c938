"""What was measured, in each room's `evidence.json`: read often, written only by `regard run --record`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regard.data.files import write_atomically
from regard.paper import Paper


@dataclass(frozen=True)
class SeedResult:
    """What one seed of one claim gave."""

    seed: int
    measured: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Evidence:
    """What is known of one claim: the statement and its rule's verdict, with all that is needed to judge it."""

    claim: str
    statement: str
    published: str
    baseline: str
    holds: bool
    results: tuple[SeedResult, ...]
    recorded_at: str
    """ISO 8601, in UTC."""
    device: str
    versions: dict[str, str]
    """Of Python and of the packages that the measurement ran on."""
    code: dict[str, str]
    """A hash for every module that the room's `claim.py` reaches; see `regard.evidence.staleness`."""

    @property
    def seeds(self) -> int:
        """How many seeds were measured."""
        return len(self.results)

    @property
    def measured(self) -> dict[str, float]:
        """The mean of each measurement over the seeds."""
        if not self.results:
            return {}
        return {key: sum(r.measured[key] for r in self.results) / self.seeds for key in self.results[0].measured}


class CorruptEvidence(ValueError):
    """A file of evidence that cannot be read."""


def evidence_path(paper: Paper) -> Path:
    """Where the room keeps its evidence."""
    return paper.folder / "evidence.json"


def read(paper: Paper) -> list[Evidence]:
    """The recorded evidence of a paper, claim by claim; empty where nothing was recorded.

    Raises CorruptEvidence, naming the file, where it is not what `write` writes.
    """
    path = evidence_path(paper)
    if not path.exists():
        return []
    content = read_json(path)
    try:
        return [_from_json(claim, fields) for claim, fields in _field(content, "claims", dict).items()]
    except ValueError as error:
        raise CorruptEvidence(f"{path} is not evidence that regard wrote: {error}; {_REMEDY}") from None


def write(paper: Paper, evidence: Iterable[Evidence], claims: Collection[str]) -> Path:
    """The room's evidence file, in which this evidence replaces what was recorded of the same claims.

    What was recorded of other claims stays, if they are among `claims`, the names of all that the paper claims today.
    Raises ValueError, naming claim, seed and key, where a measurement is not a finite number.
    """
    fresh = {e.claim: e for e in evidence}
    for claim, record in fresh.items():
        for result in record.results:
            check_measured(claim, result.seed, result.measured)
    known = {e.claim: e for e in read(paper) if e.claim in claims} | fresh
    content = {"slug": paper.slug, "claims": {name: _to_json(known[name]) for name in sorted(known)}}
    return write_json(evidence_path(paper), content)


def check_measured(claim: str, seed: int, measured: object) -> dict[str, float]:
    """The measurements as plain floats.

    Raises ValueError, naming claim, seed and key, where one is not a finite number.
    """
    if not isinstance(measured, Mapping) or not measured:
        raise ValueError(f"claim {claim!r}, seed {seed}: measure must return a dict of numbers, got {measured!r}")
    checked = {}
    for key, value in measured.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise ValueError(f"claim {claim!r}, seed {seed}: {key!r} must be a number, got a {kind}") from None
        if not math.isfinite(number):
            raise ValueError(f"claim {claim!r}, seed {seed}: {key!r} must be a finite number, got {number}")
        checked[str(key)] = number
    return checked


def read_json(path: Path) -> Any:
    """What the JSON file holds.

    Raises CorruptEvidence, naming the file, where it does not parse or holds NaN or infinity.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:  # JSON and Unicode errors are both ValueErrors
        raise CorruptEvidence(f"{path} cannot be read: {error}; {_REMEDY}") from None


def write_json(path: Path, content: Any) -> Path:
    """The path, which now holds the content as JSON, whole or not at all."""
    return write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


_REMEDY = "restore it or delete it, and measure again"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name} where a finite number must be")


def _to_json(evidence: Evidence) -> dict[str, Any]:
    fields = asdict(evidence)
    del fields["claim"]  # it is the key under which this stands
    results = fields.pop("results")
    return fields | {"measured": evidence.measured, "seeds": results}


def _from_json(claim: str, fields: Any) -> Evidence:
    results = []
    for row in _field(fields, "seeds", list):
        seed = _field(row, "seed", int)
        measured = check_measured(claim, seed, _field(row, "measured", dict))
        results.append(SeedResult(seed, measured, seconds=float(_field(row, "seconds", int | float))))
    texts = {name: _field(fields, name, str) for name in _TEXTS}
    maps = {name: _field(fields, name, dict) for name in ("versions", "code")}
    return Evidence(claim=claim, holds=_field(fields, "holds", bool), results=tuple(results), **texts, **maps)


_TEXTS = ("statement", "published", "baseline", "recorded_at", "device")


def _field(fields: Any, name: str, kind: Any) -> Any:
    if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
        raise ValueError(f"{name!r} is missing or not of its kind")
    return fields[name]
