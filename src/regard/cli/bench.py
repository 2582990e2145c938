"""`regard bench`: attention kernels, cache policies, or sequence mixers, side by side."""

# Annotations are evaluated here, not postponed: the type of the options is known only at run time.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from regard.cli.options import UsageError, check_device, check_folder, parse, print_json, progress
from regard.evidence.report import Report, format_cell
from regard.paper import Run


@dataclass(frozen=True)
class Bench:
    """One bench: where it is defined, and what it compares."""

    module: str
    options: str
    function: str
    description: str


BENCHES = {
    "attention": Bench(
        "regard.evidence.attention_bench",
        "AttentionBench",
        "bench_attention",
        "Attention kernels side by side: time against length.",
    ),
    "llm": Bench(
        "regard.evidence.llm_bench",
        "LLMBench",
        "bench_llm",
        "Cache policies side by side on one language model: what they find, predict and hold, and what a token costs.",
    ),
    "mixers": Bench(
        "regard.evidence.mixer_bench",
        "MixerBench",
        "bench_mixers",
        "Sequence mixers side by side, trained on the same data: loss, recall, time per token, bytes of state.",
    ),
}


WIDE = 7
"""How many columns a terminal shows without cutting them."""


@dataclass(frozen=True)
class Surroundings:
    """What every bench accepts."""

    workdir: Path = Path("runs/bench")
    """The folder that results, pictures and the report go to."""
    seed: int = 0
    """The seed of data and weights."""
    device: str = "cpu"
    """The PyTorch device to measure on."""
    json: bool = False
    """Print the rows as JSON."""


def main(argv: list[str]) -> int:
    """Runs a bench and prints its rows."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        width = max(map(len, BENCHES))
        print("usage: regard bench {attention,llm,mixers} [options]\n")
        print("\n".join(f"  {key:<{width}}  {bench.description}" for key, bench in BENCHES.items()))
        return 0
    if name not in BENCHES:
        near = get_close_matches(name, BENCHES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no bench {name!r}{hint} (the benches are {', '.join(BENCHES)})")
    bench = BENCHES[name]
    options, around = parse(options_of(name), rest, f"regard bench {name}", bench.description)
    check_folder(around.workdir, "--workdir")
    check_device(around.device)
    module = import_module(bench.module)
    folder = around.workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with progress() as display:
            run = Run(seed=around.seed, workdir=folder, device=around.device, display=display)
            path = getattr(module, bench.function)(options, run)
    except ValueError as error:  # a bench raises it, as documented, on what it was asked for
        raise UsageError(str(error)) from error
    rows = module.rows_of(path)
    report = _report(bench, rows, folder).write(folder / "report.html")
    if around.json:
        print_json(rows)
    else:
        _print(rows, path, report)
    return 0


def options_of(name: str) -> Callable[..., tuple[Any, Surroundings]]:
    """A function whose parameters are the options of the bench."""
    bench = BENCHES[name]
    kind = getattr(import_module(bench.module), bench.options)
    flat = tyro.conf.arg(name="")

    def collect(
        options: Annotated[kind, flat],  # type: ignore[valid-type]
        surroundings: Annotated[Surroundings, flat],
    ) -> tuple[Any, Surroundings]:
        return options, surroundings

    return collect


def completions() -> dict[str, Callable[..., Any]]:
    """The benches, for shell completion."""
    return {name: options_of(name) for name in BENCHES}


def _report(bench: Bench, rows: Sequence[dict[str, Any]], folder: Path) -> Report:
    report = Report("Side by side", bench.description)
    if rows:
        report.table(*upright(rows))
    for picture in sorted((folder / "figures").glob("*.png")):
        report.figure(picture, picture.stem)
    return report


def upright(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headers and cells of a table that is not wider than a terminal: many measurements go downwards."""
    headers = [key.replace("_", " ") for key in rows[0]]
    cells = [list(row.values()) for row in rows]
    if len(headers) <= WIDE:
        return headers, cells
    corner, *names = headers
    first, *measured = zip(*cells, strict=True)
    return [corner, *map(str, first)], [[name, *values] for name, values in zip(names, measured, strict=True)]


def _print(rows: Sequence[dict[str, Any]], path: Path, report: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if rows:
        headers, cells = upright(rows)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(headers):
            numeric = all(isinstance(row[column], int | float) for row in cells)
            table.add_column(Text(name), justify="right" if numeric else "left")
        for row in cells:
            table.add_row(*(Text(format_cell(cell)) for cell in row))
        console.print(table)
    console.print(f"Results: {path}\nReport: {report}", markup=False, soft_wrap=True)
