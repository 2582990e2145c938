"""Options read from YAML are the ones that were written, and what does not fit is named."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec

from regard.cli.config import overlaid, plain, read_mapping
from regard.cli.options import UsageError


class Colour(Enum):
    RED = 1
    BLUE = 2


class Ratio:
    def __init__(self, top: int, bottom: int):
        self.value = top / bottom
        self.parts = (top, bottom)

    def __eq__(self, other):
        return self.parts == other.parts

    __hash__ = None


RATIO = PrimitiveConstructorSpec(
    nargs=1,
    metavar="A:B",
    instance_from_str=lambda words: Ratio(*map(int, words[0].split(":"))),
    is_instance=lambda value: isinstance(value, Ratio),
    str_from_instance=lambda ratio: [":".join(map(str, ratio.parts))],
)


@dataclass(frozen=True)
class Inner:
    steps: int = 3
    rate: float = 0.5
    name: str = "inner"


@dataclass(frozen=True)
class Options:
    source: Path
    inner: Inner = field(default_factory=lambda: Inner(steps=60))
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("x", 1.0)
    words: Sequence[str] = ()
    limit: int | None = None
    colour: Colour = Colour.RED
    table: dict[str, float] = field(default_factory=dict)
    ratio: Annotated[Ratio, RATIO] = field(default_factory=lambda: Ratio(1, 2))

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")


FULL = Options(
    Path("a/b"),
    inner=Inner(9, 1e-5, "ü"),
    flag=True,
    kind="b",
    sizes=(7,),
    pair=("y", 2.0),
    words=("p", "q"),
    limit=4,
    colour=Colour.BLUE,
    table={"k": 0.25},
    ratio=Ratio(3, 4),
)


@pytest.mark.parametrize("options", [FULL, Options(Path("c"))])
def test_what_is_written_reads_back(options):
    written = yaml.safe_dump(plain(options))
    assert overlaid(Options, yaml.safe_load(written), "") == options


def test_what_is_given_goes_over_the_defaults_of_the_field():
    read = overlaid(Options, {"source": "x", "inner": {"rate": 2}}, "")
    assert read.inner == Inner(steps=60, rate=2.0) and isinstance(read.inner.rate, float)
    assert read.sizes == (1, 2)
    again = overlaid(Options, {"inner": {"name": "new"}}, "", default=FULL)
    assert again.inner == Inner(9, 1e-5, "new") and again.source == Path("a/b")


def test_yaml_takes_1e_3_for_text_and_we_for_a_number():
    assert overlaid(Inner, yaml.safe_load("rate: 1e-3"), "").rate == 1e-3


def test_what_is_missing_is_left_to_the_command_line():
    assert overlaid(Options, {"limit": 0}, "").source is tyro.MISSING


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sorce": "x"}, "f.yaml: sorce is not an option; did you mean 'source'?"),
        ({"inner": {"stops": 1}}, "f.yaml: inner.stops is not an option; did you mean 'steps'?"),
        ({"zzz": 1}, "f.yaml: zzz is not an option (the options are source, inner, flag, "),
        ({"inner": 3}, "f.yaml: inner must be options by name, got 3"),
        ({"inner": {"steps": 1.5}}, "f.yaml: inner.steps must be a whole number, got 1.5"),
        ({"inner": {"steps": True}}, "f.yaml: inner.steps must be a whole number, got True"),
        ({"inner": {"rate": "fast"}}, "f.yaml: inner.rate must be a number, got 'fast'"),
        ({"inner": {"rate": False}}, "f.yaml: inner.rate must be a number, got False"),
        ({"inner": {"name": 1}}, "f.yaml: inner.name must be text, got 1"),
        ({"flag": "no"}, "f.yaml: flag must be true or false, got 'no'"),
        ({"source": 1}, "f.yaml: source must be a path, got 1"),
        ({"kind": "c"}, "f.yaml: kind must be one of a, b, got 'c'"),
        ({"sizes": 3}, "f.yaml: sizes must be a list, got 3"),
        ({"sizes": ["x"]}, "f.yaml: sizes must be a list, got ['x']"),
        ({"pair": ["x"]}, "f.yaml: pair must be a list, got ['x']"),
        ({"limit": "x"}, "f.yaml: limit must be a whole number or null, got 'x'"),
        ({"colour": "GREEN"}, "f.yaml: colour must be one of RED, BLUE, got 'GREEN'"),
        ({"table": [1]}, "f.yaml: table must be options by name, got [1]"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], sentence):
    with pytest.raises(UsageError) as raised:
        overlaid(Options, given, "f.yaml: ")
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- 1\n- 2\n", "must hold options by name, such as 'seed: 1', got list"),
        (b"1: 2\n", "must hold options by name, such as 'seed: 1', got dict"),
        (b"a: [1\n", "--config must be a YAML file, got "),
        (b"\xff\xfe", "--config must be a YAML file, got "),
    ],
)
def test_files_that_hold_no_options(tmp_path, content, sentence):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_mapping(path)
    assert sentence in str(raised.value)
    with pytest.raises(UsageError, match=r"--config must be a file that can be read, got .*gone\.yaml"):
        read_mapping(tmp_path / "gone.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# nothing yet\n")
    assert read_mapping(path) == {}
