"""`regard demo`: a language model reads a long document four ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.options import UsageError, check_folder, parse, print_json, progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from regard.evidence.demo import Row
    from regard.llm.longcontext import Prompt


@dataclass(frozen=True)
class Options:
    """What `regard demo` accepts."""

    model: str = "smollm2"
    """A folder with a Hugging Face model, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    gates: str = "smollm2-135m-instruct"
    """DuoAttention's gates for the model: a name that ships with it, or a folder made by regard train duo_attention."""
    tokens: int = 2000
    """Tokens of the document."""
    passkeys: int = 3
    """Passkeys to hide in it, from 1 to 3."""
    seed: int = 1
    """Of the document, of the passkeys and of the random half of the heads."""
    report: Path = Path("report.html")
    """The file to write: table, pictures and answers in one page."""
    json: bool = False
    """Print the rows as JSON."""


def main(argv: list[str]) -> int:
    """Reads, asks, prints one table, and writes the report."""
    options = parse(Options, argv, "regard demo", "A language model reads a long document four ways.")
    check_folder(options.report.parent, "the folder of --report")
    if options.report.is_dir():
        raise UsageError(f"--report must be a file, got the folder {options.report}")
    if options.seed < 0:
        raise UsageError(f"--seed must be at least 0, got {options.seed}")
    with progress() as display:
        loading = display.add_task(f"loading {options.model}", total=None)
        from regard.evidence import demo
        from regard.llm.load import load
        from regard.llm.longcontext import Haystack
        from regard.papers.duo_attention import find_gates

        try:
            gates = find_gates(options.gates)
        except (ValueError, OSError) as error:
            raise UsageError(f"--gates: {error}") from error
        loaded = load(options.model)
        try:
            prompt, places = demo.hide(Haystack(loaded.tokenizer), options.tokens, options.passkeys, options.seed)
            ways = demo.four_ways(gates, options.seed)
            demo.check(loaded, prompt, ways)
        except ValueError as error:
            raise UsageError(str(error)) from error
        display.remove_task(loading)
        rows: list[Row] = []
        for way, policy in ways.items():
            reading = display.add_task(f"{len(rows) + 1} of {len(ways)}: {way}", total=100)
            advance = partial(_advance, display, reading)
            rows.append(demo.measure(loaded, prompt, way, policy, advance))
            display.update(reading, completed=100)
        drawing = display.add_task("looking where the heads look", total=None)
        heads = demo.look(loaded, prompt, places, ways["DuoAttention"])
        display.remove_task(drawing)
    if options.json:
        print_json([asdict(row) for row in rows])
    else:
        _print(rows, prompt)
    path = demo.demo_report(loaded, prompt, places, rows, heads).write(options.report)
    if not options.json:
        print(f"\nPictures and answers: {path}\nTry next:")
        print("\n".join(f"  {command}" for command in demo.next_commands(options.model)))
    return 0


def _advance(display: Progress, task: TaskID, share: float) -> None:
    display.advance(task, 100 * share)


def _print(rows: Sequence[Row], prompt: Prompt) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    hidden = len(prompt.turns)
    console.print(
        f"A document of {len(prompt.context):,} tokens hides {hidden} passkeys of 8 words. The model has read it under "
        "four rules of what its cache may keep, and recites them from their first words. Loss: nats per token."
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("way", no_wrap=True)
    room = max(console.width - 66, 16)  # of what the other columns leave; the report has the whole answers
    table.add_column("what the model recites", no_wrap=True, overflow="ellipsis", max_width=room)
    for name in ("right", "loss", "MB", "reads", "answers"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        pairs = zip(row.answers, prompt.turns, strict=True)
        said = Text("\n").join(_marked(text, turn.expected[0]) for text, turn in pairs)
        right = Text(f"{row.correct} of {hidden}", "bold green" if row.correct == hidden else "bold red")
        seconds = f"{row.prefill_seconds:.1f} s", f"{row.decode_seconds:.1f} s"
        table.add_row(row.way, said, right, f"{row.loss:.2f}", f"{row.bytes_held / 1e6:.1f}", *seconds)
    console.print(table)


def _marked(answer: str, key: str) -> Any:
    """The answer, green as far as it is the passkey."""
    from rich.text import Text

    words, wanted = answer.split(), key.split()
    text = Text()
    for index, word in enumerate(words):
        same = index < len(wanted) and word.lower() == wanted[index]
        text.append(("" if index == 0 else " ") + word, "green" if same else "red")
    return text
