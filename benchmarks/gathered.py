"""What attention over chosen positions costs: beside all keys, beside other ways, beside reading the rows at all.

Run alone on the machine: `python benchmarks/gathered.py`. One query, as in decoding. The ways take turns, call by call,
each call with positions that no other call has had lately, so that no cache holds what it reads. The floor sums as
many scattered rows of a table much larger than the cache: the cheapest call that touches every byte.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from regard.attention.attend import attend
from regard.attention.gathered import gathered_attention, gathered_attention_reference
from regard.evidence.store import write_json
from regard.evidence.timing import in_turn, ratio
from regard.paper import Run

DIM = 64
KEYS = (8192, 32768, 131072)
CHOSEN = (512, 2048)
CASES = {"own choice": (8, 8, 8), "own choice, grouped": (9, 3, 9), "shared choice, grouped": (9, 3, 3)}
"""Heads, KV heads and groups: whether each query head chooses, or each KV head."""
SPEEDUP, SPEEDUP_KEYS, SPEEDUP_CHOSEN = 8.0, 131072, 2048
"""What is aimed at: at least so many times as fast as all keys, with as many heads as KV heads, at this size."""
ROUNDS, DRAWS = 31, 64
TABLE_ROWS = 1 << 20
"""Of the floor's table: 256 MiB."""
RESULTS = Path(__file__).parent / "results" / "gathered.json"
RUN = Run(seed=0, workdir=RESULTS.parent)


def draws(generator: torch.Generator, groups: int, chosen: int, keys: int) -> list[Tensor]:
    """Positions without repetition, in no order, for as many calls as `DRAWS`."""
    picked = [torch.randperm(keys, generator=generator)[:chosen] for _ in range(DRAWS * groups)]
    return list(torch.stack(picked).view(DRAWS, 1, groups, chosen))


@torch.no_grad()
def measured(case: str, keys: int, chosen: int, table: Tensor) -> dict:
    """Every way on the same tensors, in turn."""
    heads, kv_heads, groups = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, 1, DIM, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, keys, DIM, generator=generator)
    k_rows, v_rows = k.view(-1, DIM), v.view(-1, DIM)
    first_rows = (torch.arange(groups) // (groups // kv_heads) * keys)[:, None]
    positions: Iterator[Tensor] = cycle(draws(generator, groups, chosen, keys))
    bags = torch.get_num_threads()  # one for each thread
    scattered = cycle(torch.randint(len(table), (DRAWS, bags, 2 * groups * chosen // bags), generator=generator))

    def select(index: Tensor) -> Tensor:
        rows = (index[0] + first_rows).flatten()
        chosen_k, chosen_v = (of.index_select(0, rows).view(1, groups, chosen, DIM) for of in (k_rows, v_rows))
        queries = q.view(1, groups, heads // groups, DIM)
        return scaled_dot_product_attention(queries, chosen_k, chosen_v).view(1, heads, 1, DIM)

    index = next(positions)
    expected = gathered_attention_reference(q, k, v, index)
    torch.testing.assert_close(gathered_attention(q, k, v, index), expected)
    torch.testing.assert_close(select(index), expected)
    calls = {
        "all_keys": lambda: attend(q, k, v),
        "gather": lambda: gathered_attention_reference(q, k, v, next(positions)),
        "index_select": lambda: select(next(positions)),
        "gathered": lambda: gathered_attention(q, k, v, next(positions)),
        "floor": lambda: embedding_bag(next(scattered), table, mode="sum"),
    }
    times = in_turn(calls, ROUNDS, RUN)
    return {
        "case": case,
        "keys": keys,
        "chosen": chosen,
        **{f"{name}_us": 1e6 * median(seconds) for name, seconds in times.items()},
        "all_keys_over_gathered": ratio(times, "all_keys", "gathered"),
        "gathered_over_floor": ratio(times, "gathered", "floor"),
    }


def show(rows: list[dict]) -> None:
    title = f"one query over chosen positions, heads of {DIM}, fp32, {torch.get_num_threads()} threads"
    shown = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(shown)


def main() -> None:
    table = torch.randn(TABLE_ROWS, DIM, generator=torch.Generator().manual_seed(1))
    rows = [measured(case, keys, chosen, table) for case in CASES for keys in KEYS for chosen in CHOSEN]
    show(rows)
    (aim,) = [
        row["all_keys_over_gathered"]
        for row in rows
        if (row["case"], row["keys"], row["chosen"]) == ("own choice", SPEEDUP_KEYS, SPEEDUP_CHOSEN)
    ]
    target = {"keys": SPEEDUP_KEYS, "chosen": SPEEDUP_CHOSEN, "all_keys_over_gathered": SPEEDUP, "met": aim >= SPEEDUP}
    versions = {"threads": torch.get_num_threads(), "torch": torch.__version__, "dim": DIM, "rounds": ROUNDS}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**versions, "cases": CASES, "target": target, "measured": rows})
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
