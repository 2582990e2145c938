"""The options of a job as YAML: read over a dataclass's defaults, and written so that they read back the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec

from regard.cli.options import UsageError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


class _Unfit(Exception):
    """The value is not of the type."""


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds, by key. Raises UsageError where it cannot be read or is not a mapping of names."""
    try:
        given = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config must be a file that can be read, got {path} ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config must be a YAML file, got {path}: {error}") from None
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise UsageError(f"{path} must hold options by name, such as 'seed: 1', got {type(given).__name__}")
    return given


def overlaid(kind: type, given: Mapping[str, Any], where: str, default: Any = MISSING) -> Any:
    """The dataclass's default with what is given in its place, for tyro's `default=`.

    It is not checked by `__post_init__`, for the command line may yet change it: options without a value are
    `tyro.MISSING`. `where` goes before the name of an option in messages. Raises UsageError that names an option that
    is not known, or whose value is of another type.
    """
    known = {field.name: field for field in fields(kind) if field.init}
    hints = get_type_hints(kind, include_extras=True)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (the options are {', '.join(known)})"
            raise UsageError(f"{where}{name} is not an option{hint}")
    made: Any = object.__new__(kind)
    for name, field in known.items():
        value: Any
        if default is not MISSING:
            value = getattr(default, name)
        elif field.default is not MISSING:
            value = field.default
        elif name in given and not is_dataclass(hints[name]):
            value = tyro.MISSING  # a factory may be costly, or fail where its product is not needed
        else:
            factory: Any = field.default_factory
            value = tyro.MISSING if factory is MISSING else factory()
        if name in given:
            try:
                value = _converted(hints[name], given[name], f"{where}{name}", value)
            except _Unfit:
                wanted = _in_words(hints[name])
                raise UsageError(f"{where}{name} must be {wanted}, got {given[name]!r}") from None
        object.__setattr__(made, name, value)
    return made


def plain(value: Any, annotation: Any = Any) -> Any:
    """The value as YAML knows it: what `overlaid` reads as the same value."""
    spec = _spec(annotation)
    if spec is not None:
        words = spec.str_from_instance(value)
        return words[0] if len(words) == 1 else list(words)
    if is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        return {
            field.name: plain(getattr(value, field.name), hints[field.name]) for field in fields(value) if field.init
        }
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _spec(annotation: Any) -> Any | None:
    found = [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, PrimitiveConstructorSpec)]
    return found[0] if found else None


def _converted(annotation: Any, given: Any, where: str, default: Any = MISSING) -> Any:
    """The given value as one of the annotated type. Raises _Unfit where it is not."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if (spec := _spec(annotation)) is not None:
        words = given if isinstance(given, list) else [given]
        return spec.instance_from_str([str(word) for word in words])
    if origin is Annotated:
        return _converted(parts[0], given, where, default)
    if annotation is Any:
        return given
    if origin in (Union, UnionType):
        return _first_fit(parts, given, where, default)
    if origin is Literal:
        return _require(any(type(given) is type(part) and given == part for part in parts), given)
    if is_dataclass(annotation):
        _require(isinstance(given, Mapping), given)
        base = default if isinstance(default, annotation) else MISSING  # type: ignore[arg-type]
        return overlaid(annotation, given, f"{where}.", base)  # type: ignore[arg-type]
    if origin in (tuple, list, set, frozenset, Sequence):
        _require(isinstance(given, list), given)
        fixed = origin is tuple and parts and parts[-1] is not Ellipsis
        _require(not fixed or len(given) == len(parts), given)
        kinds = parts if fixed else [parts[0]] * len(given) if parts else [Any] * len(given)
        items = [_converted(kind, item, where) for kind, item in zip(kinds, given, strict=True)]
        return items if origin is list else (tuple if origin is Sequence else origin)(items)
    if origin in (dict, Mapping):
        _require(isinstance(given, Mapping), given)
        return {key: _converted(parts[1], item, f"{where}.{key}") for key, item in given.items()}
    if annotation is float:
        return _number(given)
    if annotation is int:
        return _require(isinstance(given, int) and not isinstance(given, bool), given)
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return annotation(_require(isinstance(given, str), given))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation[_require(isinstance(given, str) and given in annotation.__members__, given)]
    return _require(given is None if annotation in (None, NoneType) else isinstance(given, annotation), given)


def _first_fit(kinds: Sequence[Any], given: Any, where: str, default: Any) -> Any:
    for kind in kinds:
        try:
            return _converted(kind, given, where, default)
        except _Unfit:
            continue
    raise _Unfit


def _number(given: Any) -> float:
    if isinstance(given, str):  # YAML 1.1 takes 1e-3 for text
        try:
            return float(given)
        except ValueError:
            raise _Unfit from None
    return float(_require(isinstance(given, int | float) and not isinstance(given, bool), given))


def _require(fits: bool, given: Any) -> Any:
    if not fits:
        raise _Unfit
    return given


def _in_words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (tuple, list, set, frozenset, Sequence):
        return "a list"
    if origin in (dict, Mapping) or is_dataclass(annotation):
        return "options by name"
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return "a path"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(annotation.__members__)}"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
