"""`regard generate`: a language model answers or continues a text, under a cache policy."""

# Annotations are evaluated here, not postponed: the type of the policy's options is known only at run time.
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from regard import papers
from regard.cli.options import UsageError, check_device, given_for, parse, print_json, progress

if TYPE_CHECKING:
    from regard.llm.generate import Sampling, Summary
    from regard.llm.load import Loaded
    from regard.llm.policy import CachePolicy

BASELINES = ("full", "streaming", "h2o", "snapkv")
"""The policies that belong to no paper of the house, as `regard.llm.policies.POLICIES` names them."""
DTYPES = ("float32", "bfloat16", "float16")

_TEXT: Any = PrimitiveConstructorSpec(
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda words: words[0],  # "None" is a text, too
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [value or ""],
)
_NO_DEFAULT: Any = tyro.conf.arg(help_behavior_hint="")
_FILE: Any = tyro.conf.arg(metavar="FILE", help_behavior_hint="")
_BITS: Any = tyro.conf.arg(metavar="BITS", help_behavior_hint="(default: as they come)")
_CHUNK: Any = tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all where the policy needs that, else 512)")


@dataclass(frozen=True)
class Options:
    """What `regard generate` accepts under every policy."""

    model: str = "smollm2"
    """A folder with a Hugging Face model, a .gguf file, the id of a downloaded model, or smollm2, which is built in."""
    policy: Annotated[str, tyro.conf.arg(metavar="NAME")] = "full"
    """What the key-value cache keeps; with --help, that policy's options are shown too."""
    kv_bits: Annotated[int | None, _BITS] = None
    """Bits of every number of the keys and values that the policy keeps: 8 or 4."""
    prompt: Annotated[str | None, _TEXT, _NO_DEFAULT] = None
    """The text to answer; this or --prompt-file is needed."""
    prompt_file: Annotated[Path | None, _FILE] = None
    """A UTF-8 text file to answer; - is standard input."""
    system: Annotated[str | None, _TEXT, _NO_DEFAULT] = None
    """What the model is told to be, where it has a chat format."""
    no_chat: bool = False
    """Continue the text as it is, outside of the model's chat format."""
    max_new_tokens: int = 256
    """Most tokens to make."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, the higher the more varied."""
    top_p: float = 1.0
    """At a temperature above 0, draw out of the likeliest tokens whose probabilities reach this."""
    seed: int = 0
    """Of the draws."""
    prefill_chunk: Annotated[int | None, _CHUNK] = None
    """Tokens of the prompt that are read at once."""
    device: str = "cpu"
    """The PyTorch device to run on."""
    dtype: str = "float32"
    """Of the weights and the cache: float32, bfloat16 or float16."""
    json: bool = False
    """Print the text and what it took as JSON, when it is finished."""


def main(argv: list[str]) -> int:
    """Prints the text as it is made, and what it took on stderr."""
    name = given_for("--policy", argv, default="full")
    options, policy = parse(options_of(name), argv, "regard generate", _description())
    if options.policy != name:
        raise UsageError(f"--policy must be written out and come once, got both {name!r} and {options.policy!r}")
    text = prompt_of(options)
    sampling = _checked(options)
    from regard.llm.generate import Generation, encode
    from regard.llm.policies import Full, Quantised

    policy = policy or Full()
    if options.kv_bits is not None:
        policy = Quantised(policy, options.kv_bits)
    pieces = []
    with progress() as display:
        loading = display.add_task(f"loading {options.model}", total=None)
        loaded = _load(options)
        display.remove_task(loading)
        reading = display.add_task("reading the prompt", total=None)
        try:
            tokens = encode(loaded.tokenizer, text, options.system, in_chat=not options.no_chat)
            display.update(reading, total=tokens.shape[1])
            generation = Generation(
                loaded,
                tokens,
                policy,
                sampling,
                prefill_chunk=options.prefill_chunk,
                on_read=lambda done: display.update(reading, completed=done),
            )
        except ValueError as error:  # of what was asked for; nothing has run yet
            raise UsageError(str(error)) from error
        stream = iter(generation)
        pieces.append(next(stream, ""))
    show = _hold_back if options.json else _print_now
    show(pieces[0])
    for piece in stream:
        pieces.append(piece)
        show(piece)
    summary = generation.summary
    assert summary is not None
    if options.json:
        rate = round(summary.tokens_per_second, 3)
        about = {"model": options.model, "policy": name, "text": "".join(pieces)}
        print_json(about | asdict(summary) | {"tokens_per_second": rate})
    else:
        print()
        print(sentence(summary), file=sys.stderr)
    return 0


def options_of(name: str) -> Callable[..., tuple[Options, Any]]:
    """A function whose parameters are the options of the verb and of the policy: it returns both.

    The policy is None where it is `full`, which has no options, so that help is there without importing a model.
    Raises UsageError, with the nearest name, where there is no such policy.
    """
    flat = tyro.conf.arg(name="")
    if name == "full":

        def without(options: Annotated[Options, flat]) -> tuple[Options, Any]:
            return options, None

        return without
    kind = policy_kind(name)

    def collect(
        options: Annotated[Options, flat],
        policy: Annotated[kind, flat],  # type: ignore[valid-type]
    ) -> tuple[Options, Any]:
        return options, policy

    return collect


def policy_kind(name: str) -> "type[CachePolicy]":
    """The class of the policy of that name: a baseline, or what a room offers in its `POLICIES`."""
    from regard.llm.policies import POLICIES

    if name in POLICIES:
        return POLICIES[name]
    rooms = _rooms()
    if name in rooms:
        offered = _policies_of(name)
    else:  # a room may offer several, and none of the others need be importable here
        offered = {}
        for slug in rooms:
            with suppress(ImportError):
                offered |= _policies_of(slug)
    if name in offered:
        return offered[name]
    known = [*POLICIES, *offered]
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"no policy {name!r}{hint} (the policies are {', '.join(known)})")


def completions() -> dict[str, Callable[..., Any]]:
    """The verb, for shell completion: without the options of particular policies."""
    return {"": options_of("full")}


def prompt_of(options: Options) -> str:
    """The prompt, from the command line, a file or standard input."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise UsageError("the prompt must come by --prompt or by --prompt-file, one of them")
    if options.prompt is not None:
        return options.prompt
    file = str(options.prompt_file)
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file must be UTF-8 text, got {file}, whose byte {error.start} is not") from None
    except OSError as error:
        raise UsageError(f"--prompt-file must be a file that can be read, got {file} ({error.strerror})") from None


def sentence(summary: "Summary") -> str:
    """What the text took, in one line."""
    made = f"{summary.new_tokens:,} made"
    if summary.tokens_per_second:
        made += f" at {summary.tokens_per_second:.1f} a second"
    held = f"{_size(summary.bytes_held)} of keys and values held"
    if summary.bytes_held != summary.bytes_of_full_attention:
        held += f" (full attention: {_size(summary.bytes_of_full_attention)})"
    if summary.bytes_of_bookkeeping:
        held += f" and {_size(summary.bytes_of_bookkeeping)} of bookkeeping"
    ended = {
        "end": "",
        "length": "; stopped by --max-new-tokens",
        "context": "; stopped as the model's context is full",
    }
    read = f"{summary.prompt_tokens:,} tokens read in {summary.prefill_seconds:.1f} s"
    return f"{read}, {made}; {held}{ended[summary.stopped]}"


def _checked(options: Options) -> "Sampling":
    if options.prefill_chunk is not None and options.prefill_chunk < 1:
        raise UsageError(f"--prefill-chunk must be at least 1, got {options.prefill_chunk}")
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.kv_bits not in (None, 8, 4):
        raise UsageError(f"--kv-bits must be 8 or 4, got {options.kv_bits}")
    check_device(options.device)
    from regard.llm.generate import Sampling

    try:
        return Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _load(options: Options) -> "Loaded":
    import torch

    from regard.llm.load import load

    return load(options.model, dtype=getattr(torch, options.dtype), device=options.device)


def _description() -> str:
    names = ", ".join([*BASELINES, *_rooms()])
    return f"Answer a text with a language model, its key-value cache under a policy: {names}."


def _rooms() -> list[str]:
    return [paper.slug for paper in papers.all() if "cache_policy" in paper.provides]


def _policies_of(slug: str) -> "dict[str, type[CachePolicy]]":
    return getattr(import_module(papers.get(slug).module), "POLICIES", {})


def _print_now(piece: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(piece.encode(encoding, "replace").decode(encoding), end="", flush=True)


def _hold_back(piece: str) -> None:
    """JSON is printed whole."""


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"
