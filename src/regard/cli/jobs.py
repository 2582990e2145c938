"""What `regard train`, `regard eval` and `regard predict` share: they run a room's jobs."""

# Annotations are evaluated here, not postponed: the type of the options is known only at run time.
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import cleandoc
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from regard import papers
from regard.cli.config import overlaid, plain, read_mapping
from regard.cli.options import UsageError, check_device, check_folder, given_for, parse, progress
from regard.data.files import write_atomically
from regard.evidence.report import format_cell
from regard.paper import Paper, Run

_FILE: Any = tyro.conf.arg(metavar="FILE", help_behavior_hint="")


@dataclass(frozen=True)
class Surroundings:
    """What every job accepts."""

    config: Annotated[Path | None, _FILE] = None
    """A YAML file with options; those on the command line go before it."""
    workdir: Path = Path("runs")
    """The folder that the job writes to."""
    seed: int = 0
    """The seed of everything random."""
    device: str = "cpu"
    """The PyTorch device to run on."""


def run_job(verb: str, description: str, argv: Sequence[str]) -> int:
    """Runs the job of that verb, of the paper and stage that the words name, and says what it made."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not words:
        if {"-h", "--help"} & set(argv):
            print(_usage(verb, description))
            return 0
        raise UsageError(f"regard {verb} needs a paper first: regard {verb} SLUG (regard {verb} --help lists them)")
    slug, *stage = words
    paper, name = papers.get(slug), " ".join([verb, *stage])
    kind = job_of(paper, name)
    rest = list(argv[len(words) :])
    given = read_mapping(Path(file)) if (file := given_for("--config", rest)) else {}
    options = options_of(kind, paper.slug, given, f"{file}: ")
    job, around = parse(options, rest, f"regard {verb} {' '.join(words)}", cleandoc(kind.__doc__ or description))
    check_folder(around.workdir, "--workdir")
    check_device(around.device)
    around.workdir.mkdir(parents=True, exist_ok=True)
    try:
        with progress() as display, config_kept(around.workdir / config_name(name), job, around):
            _seed_generators(around.seed)
            result = job.run(Run(seed=around.seed, workdir=around.workdir, device=around.device, display=display))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was finished is kept in {around.workdir}") from None
    _print(result)
    return 0


def job_of(paper: Paper, name: str) -> type:
    """The paper's job of that name. Raises UsageError, with the jobs that there are, where it has none."""
    jobs = paper.jobs()
    if not jobs:
        raise UsageError(f"{paper.slug} has no jobs: nothing in it is trained, evaluated or applied by a command")
    if name not in jobs:
        raise UsageError(f"{paper.slug} has no job {name!r} (its jobs are {', '.join(jobs)})")
    return jobs[name]


def options_of(
    kind: type, slug: str, given: Mapping[str, Any] | None = None, where: str = ""
) -> Callable[..., tuple[Any, Surroundings]]:
    """A function whose parameters are the options of the job and of its surroundings; `given` replaces defaults.

    Raises UsageError that names an option in `given` which is not known, or whose value is of another type.
    """
    given = dict(given or {})
    of_surroundings: dict[str, Any] = {name: given.pop(name) for name in ("seed", "device") if name in given}
    around = overlaid(Surroundings, of_surroundings, where, Surroundings(workdir=Path("runs") / slug))
    default = overlaid(kind, given, where)
    flat = tyro.conf.arg(name="")

    def collect(
        job: Annotated[kind, flat] = default,  # type: ignore[valid-type]
        surroundings: Annotated[Surroundings, flat] = around,
    ) -> tuple[Any, Surroundings]:
        return job, surroundings

    return collect


def config_name(job: str) -> str:
    """The file that a job's options are written to: `config.yaml` for training, which the others must not replace."""
    return "config.yaml" if job == "train" else f"config-{job.replace(' ', '-')}.yaml"


@contextmanager
def config_kept(path: Path, job: Any, around: Surroundings) -> Iterator[None]:
    """Writes the options of the run that goes on inside the block. If it is refused, what was there before is back."""
    before = path.read_bytes() if path.exists() else None
    options = plain(job) | plain(replace(around, config=None))
    kept = {name: value for name, value in options.items() if name not in ("config", "workdir")}
    write_atomically(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    try:
        yield
    except Exception:
        if before is not None:
            write_atomically(path, before)
        raise


def completions_of(verb: str) -> dict[str, Callable[..., Any]]:
    """Every paper's jobs of that verb, for shell completion."""
    found: dict[str, Callable[..., Any]] = {}
    for slug in _with_jobs():
        try:
            jobs = papers.get(slug).jobs()
        except ImportError:  # of an extra that is not installed: its jobs cannot run here
            continue
        for name, kind in jobs.items():
            if name.split()[0] == verb:
                found[" ".join([slug, *name.split()[1:]])] = options_of(kind, slug)
    return found


def _usage(verb: str, description: str) -> str:
    lines = [f"usage: regard {verb} SLUG [STAGE] [options]", "", description, ""]
    slugs = _with_jobs()
    lines.append(f"Papers with jobs: {', '.join(slugs) if slugs else 'none'}.")
    lines.append(f"regard {verb} SLUG --help has a paper's options.")
    return "\n".join(lines)


def _with_jobs() -> list[str]:
    return [paper.slug for paper in papers.all() if (paper.folder / "jobs.py").exists()]


def _seed_generators(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _print(result: Path) -> None:
    if result.suffix == ".json":
        measured = json.loads(result.read_text(encoding="utf-8"))
        if isinstance(measured, dict) and all(isinstance(value, int | float | str) for value in measured.values()):
            width = max(map(len, measured), default=0)
            print("\n".join(f"{name:<{width}}  {format_cell(value)}" for name, value in measured.items()))
    print(f"Written: {result}")
