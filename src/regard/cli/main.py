"""The command `regard`: picks the verb, imports only that verb's file, and says in one sentence what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

from regard.cli.options import UsageError
from regard.papers import UnknownPaper

VERBS = {
    "list": "the papers of the house, with what was measured of their claims",
    "show": "one paper: its card and its evidence",
    "run": "measure a paper's claims: published beside measured, and a report with pictures",
    "evidence": "what was recorded, and which code has changed since",
    "train": "train what a paper describes, on built-in data or on files of yours",
    "eval": "measure a trained or published model",
    "predict": "apply a paper's model or analysis to input of yours",
    "generate": "continue a text with a language model under a cache policy",
    "bench": "compare mechanisms side by side: attention kernels, or sequence mixers",
    "demo": "a language model reads a long document four ways",
}

GLOBAL = {
    "-h, --help": "this help; regard VERB --help has the verb's options",
    "--version": "the version of regard",
    "--debug": "anywhere: show where an error came from",
    "--tyro-write-completion SHELL FILE": "a completion script for bash, zsh, fish or tcsh",
}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for a failure, 2 for a wrong command line, 130 when interrupted."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except KeyboardInterrupt as interrupt:
        return _say(str(interrupt) or "interrupted; nothing is left half-written", 130)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _say(_sentence(error), 2 if isinstance(error, UsageError | UnknownPaper) else 1)


def usage() -> str:
    """The global help."""
    rows = [("Verbs", VERBS), ("Options", GLOBAL)]
    width = max(len(name) for _, section in rows for name in section)
    lines = ["usage: regard VERB [options]", "", "Published attention systems as working software."]
    for title, section in rows:
        lines += ["", f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in section.items())]
    return "\n".join(lines)


def _dispatch(words: list[str]) -> int:
    first, rest = (words[0], words[1:]) if words else ("--help", [])
    if first in ("-h", "--help", "help"):
        print(usage())
        return 0
    if first == "--version":
        from regard import __version__

        print(f"regard {__version__}")
        return 0
    if first.startswith("--tyro-"):
        return import_module("regard.cli.completion").main(words)
    if first not in VERBS:
        near = get_close_matches(first, VERBS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no verb {first!r}{hint} (the verbs are {', '.join(VERBS)})")
    verb: Callable[[list[str]], int] = import_module(f"regard.cli.{first}").main
    return verb(rest)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError | RuntimeError | OSError | ImportError | UnknownPaper | UsageError) and text:
        return text
    return f"{type(error).__name__}: {text or 'no more is known'} (--debug shows where)"


def _say(sentence: str, code: int) -> int:
    print(f"regard: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
