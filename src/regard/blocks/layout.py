"""The order of a hybrid model's layers, written as a short string."""

from __future__ import annotations

import re

_PIECES = re.compile(r"(?P<name>[A-Za-z_]\w*)|(?P<open>\()|(?P<close>\))|\*\s*(?P<times>-?\d+)|(?P<other>\S)")


def parse_layout(layout: str) -> tuple[str, ...]:
    """The names of the layers, first to last: "(conv linear)*2 window" is conv linear conv linear window.

    A name or a group in parentheses may be followed by `*` and how often it comes; groups may be nested. Raises
    ValueError that says what is wrong with the string.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(f"layout must be names, (groups) and *repetitions, got {layout!r}: {what}")

    groups: list[list[tuple[str, ...]]] = [[]]  # the groups that are open, outermost first, each a list of its items
    for piece in _PIECES.finditer(layout):
        if piece["name"]:
            groups[-1].append((piece["name"],))
        elif piece["open"]:
            groups.append([])
        elif piece["close"]:
            if len(groups) == 1:
                raise wrong("a parenthesis is closed that was not opened")
            group = groups.pop()
            if not group:
                raise wrong("a group is empty")
            groups[-1].append(sum(group, ()))
        elif piece["times"]:
            if not groups[-1]:
                raise wrong("nothing stands before *")
            if int(piece["times"]) < 1:
                raise wrong(f"a repetition must be at least 1, got {piece['times']}")
            groups[-1].append(groups[-1].pop() * int(piece["times"]))
        else:
            raise wrong(f"{piece['other']!r} has no meaning here")
    if len(groups) > 1:
        raise wrong("a parenthesis is not closed")
    if not groups[0]:
        raise wrong("it names no layer")
    return sum(groups[0], ())
