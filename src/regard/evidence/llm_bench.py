"""Cache policies side by side: `regard bench llm`. A policy takes part by being in its room's `POLICIES`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard import papers
from regard.evidence.staleness import code_digest, digest
from regard.evidence.store import read_json, write_json
from regard.paper import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.llm import CachePolicy, Loaded

FULL = "full"
"""The name of the policy that keeps everything: the yardstick, which has no budget."""


@dataclass(frozen=True)
class LLMBench:
    """What is compared, and on how much."""

    only: tuple[str, ...] = ()
    """Policies to compare, as `regard generate --policy` names them. The baselines and every paper's when empty."""
    model: str = "smollm2"
    """A folder with a Hugging Face model, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    fit: bool = False
    """Let policies search for heads or layers on this model first; without it they take what they found for SmolLM2."""
    contexts: tuple[int, ...] = (1000,)
    """Tokens that are read before anything is asked."""
    budgets: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Shares of the context that a KV head may hold, in the mean; policies that hold everything may read as much."""
    kv_bits: int | None = None
    """Bits of every number of the keys and values: 8 or 4; as they come when not given."""
    prompts: int = 2
    """Documents of every task."""
    continuation: int = 64
    """Tokens of plain text to predict after the context; each is a step that is timed."""
    text: str | None = None
    """Text to hide things in: a file or folder of .txt, .md or .jsonl; the Python reference when not given."""

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"prompts must be at least 1, got {self.prompts}")
        if self.continuation < 2:
            raise ValueError(f"continuation must be at least 2 tokens, got {self.continuation}")
        if not self.contexts or min(self.contexts) < 300:
            raise ValueError(f"contexts must be of 300 tokens or more, to hide all tasks, got {self.contexts}")
        if not self.budgets or not all(0 < share <= 1 for share in self.budgets):
            raise ValueError(f"budgets must be shares of the context, above 0 and up to 1, got {self.budgets}")
        if self.kv_bits not in (None, 8, 4):
            raise ValueError(f"kv_bits must be 8 or 4, got {self.kv_bits}")


@dataclass(frozen=True)
class LLMResult:
    """All that was measured of one policy at one budget in contexts of one length."""

    policy: str
    context: int
    budget: int
    """Tokens of a KV head, in the mean."""
    passkey_loss: float
    """Nats per passkey token, teacher-forced."""
    passkey_accuracy: float
    """Share of the passkeys' tokens that were the most likely ones."""
    ruler: float
    """Share of expected strings in greedy answers, the mean over the tasks."""
    text_loss: float
    """Nats per token of plain text after the context."""
    kv_bytes: int
    """Bytes of keys and values after the passkeys' context and questions."""
    prefill_seconds: float
    """To read one context."""
    decode_seconds: float
    """Of a step after it, the median."""
    tasks: dict[str, float]
    """The share of expected strings in greedy answers, task by task."""


def bench_llm(options: LLMBench, run: Run) -> Path:
    """The file of results, `llm.json` in the run's folder, with a picture of them beside it.

    All policies see the same documents. Results are written one by one: run again, the bench goes on where it stopped,
    and measures anew only what other settings or changed code ask for. A policy that does not fit the model (heads
    found for another one) is left out unless it was asked for. Raises ValueError on an unknown policy, on one that was
    asked for and does not fit, and on texts or contexts that are too short.
    """
    from regard.data.text import python_reference, read_texts
    from regard.evidence.llm_measurements import documents, measure
    from regard.llm import load

    source = python_reference() if options.text is None else read_texts(options.text)
    kinds = find_policies(options.only)
    loaded = load(options.model, device=run.device)
    policies = _made(kinds, options, loaded, source)
    path = run.workdir / "llm.json"
    basis = {"seed": run.seed, "device": run.device, "text": digest(source), "model": options.model}
    basis |= {"prompts": options.prompts, "continuation": options.continuation, "bits": options.kv_bits}
    stored = read_json(path) if path.exists() else {}
    results: dict[str, Any] = stored.get("results", {}) if stored.get("settings") == basis else {}

    wanted = []
    for context in options.contexts:
        for name, policy in policies.items():
            for tokens in [context] if name == FULL else sorted({round(s * context) for s in options.budgets}):
                wanted.append((f"{name} {context} {tokens}", name, policy, context, tokens))
    shown = [key for key, *_ in wanted]
    made: dict[int, Any] = {}
    for key, name, policy, context, tokens in run.progress(wanted, "policies and budgets"):
        code = digest(_code_of(name) + repr(policy))
        if results.get(key, {}).get("code") == code:
            continue
        if context not in made:
            made[context] = documents(loaded, source, context, options.prompts, options.continuation, run.seed)
        measured = measure(loaded, policy.with_budget(tokens, context), options.kv_bits, made[context], run, key)
        result = LLMResult(policy=name, context=context, budget=tokens, **measured)
        results[key] = {**asdict(result), "code": code}
        _write(path, basis, shown, results)
    _write(path, basis, shown, results)
    run.figure("llm", draw(results_of(path)))
    return path


def find_policies(only: Sequence[str] = ()) -> dict[str, type[CachePolicy]]:
    """The class of each policy that is asked for; without `only`, the baselines and the first one of every room.

    Raises ValueError, with the nearest name, where there is no such policy.
    """
    from regard.llm.policies import POLICIES

    rooms = [paper for paper in papers.all() if "cache_policy" in paper.provides]
    offered: dict[str, type[CachePolicy]] = dict(POLICIES)
    firsts = list(POLICIES)
    for room in rooms:
        of_room: Mapping[str, type[CachePolicy]] = import_module(room.module).POLICIES
        offered |= of_room
        firsts += list(of_room)[:1]
    for name in only:
        if name not in offered:
            near = difflib.get_close_matches(name, offered, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no policy {name!r}{hint} (the policies are {', '.join(offered)})")
    return {name: offered[name] for name in only or firsts}


def _made(
    kinds: Mapping[str, type[CachePolicy]], options: LLMBench, loaded: Loaded, source: str
) -> dict[str, CachePolicy]:
    config = loaded.model.config.get_text_config()
    made: dict[str, CachePolicy] = {}
    for name, kind in kinds.items():
        policy = kind().fit(loaded.model, [source]) if options.fit else kind()
        try:
            policy.check(config)
        except ValueError:
            if options.only:
                raise
            continue
        made[name] = policy
    if not made:
        raise ValueError(f"no policy fits {options.model}; let them search on it by fit")
    return made


def _code_of(name: str) -> str:
    """A hash of the code that the policy can reach: its room, what rooms share, and the measurements."""
    house = Path(papers.__file__).parent.parent
    folders = [house / "attention", house / "llm"]
    for paper in papers.all():
        if "cache_policy" in paper.provides and name in import_module(paper.module).POLICIES:
            folders.append(paper.folder)
    return code_digest(Path(__file__).with_name("llm_measurements.py"), *folders)


def _write(path: Path, settings: Mapping[str, Any], asked: Sequence[str], results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": settings, "shown": [key for key in asked if key in results], "results": results})


def results_of(path: Path) -> list[LLMResult]:
    """All that was measured of what the last run asked for, in its order."""
    content = read_json(path)
    return [
        LLMResult(**{key: value for key, value in content["results"][name].items() if key != "code"})
        for name in content["shown"]
    ]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """One row for each policy, context and budget of the last run."""
    return [
        {
            "policy": result.policy,
            "context": result.context,
            "budget": result.budget,
            "passkey_loss": round(result.passkey_loss, 3),
            "passkey_accuracy": round(result.passkey_accuracy, 3),
            "ruler": round(result.ruler, 3),
            "text_loss": round(result.text_loss, 3),
            "kv_mib": round(result.kv_bytes / 2**20, 2),
            "prefill_s": round(result.prefill_seconds, 2),
            "decode_ms": round(1e3 * result.decode_seconds, 1),
        }
        for result in results_of(path)
    ]


def draw(results: Sequence[LLMResult]) -> Figure:
    """Quality against what it costs: passkey loss over bytes held and over the time of a step, with the best front.

    A point stands for a policy at a budget; the larger, the longer the context.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(result.policy for result in results))
    contexts = sorted({result.context for result in results})
    costs = (
        ("MiB of keys and values held", [result.kv_bytes / 2**20 for result in results]),
        ("ms of a decoding step", [1e3 * result.decode_seconds for result in results]),
    )
    for axes, (label, cost) in zip(panels, costs, strict=True):
        for name in names:
            for size, context in enumerate(contexts):
                points = [
                    (x, result.passkey_loss)
                    for x, result in zip(cost, results, strict=True)
                    if (result.policy, result.context) == (name, context)
                ]
                if points:
                    label_once = name if context == contexts[0] else None
                    colour = f"C{names.index(name)}"
                    axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, ms=4 + 3 * size, label=label_once)
        for context in contexts:
            points = [
                (x, result.passkey_loss) for x, result in zip(cost, results, strict=True) if result.context == context
            ]
            axes.step(*zip(*front(points), strict=True), where="post", color="black", ls=":", lw=1)
        axes.set(xlabel=label, yscale="log")
    panels[0].set_ylabel("nats per passkey token")
    panels[1].legend(fontsize=8)
    figure.suptitle(f"contexts of {', '.join(f'{c:,}' for c in contexts)} tokens; dotted: nothing is better in both")
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates, by the first one; the less the better."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
