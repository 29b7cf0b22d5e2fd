"""Settings: dataclasses that carry each field's rule beside the field, and check it when they are built.

A field is written `learning_rate: Annotated[float, above(0)] = 2e-4`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Rule:
    """What a value must fulfil besides its type. In a list each item must; with `of_list`, the list itself."""

    text: str
    """Ends "must be an integer", as in "must be an integer of at least 1"."""
    holds: Callable[[Any], bool]
    of_list: bool = False


def above(low: float) -> Rule:
    """Finite, and larger than `low`."""
    return Rule(f"above {low}", lambda value: low < value < math.inf)


def at_least(low: float) -> Rule:
    """Finite, and `low` or larger."""
    return Rule(f"of at least {low}", lambda value: low <= value < math.inf)


def below(high: float) -> Rule:
    """Smaller than `high`."""
    return Rule(f"below {high}", lambda value: value < high)


ASCENDING = Rule("in ascending order, each once", lambda items: sorted(set(items)) == items, of_list=True)


class Settings:
    """Base of a dataclass of settings.

    A field's type is int, float, bool, str, Path, a Literal of texts, other `Settings` (a section), a list of these;
    or a union of these and None. Types are strict: True is no integer, and "4" is none. A list must not be
    empty. A section may be given as a dict, and a path as text; its ~ is expanded.

    Raises:
        ValueError: listing every field that breaks its rule, by dotted name, as in "lora.r (0) must be …".
    """

    def __post_init__(self) -> None:
        _refuse(type(self), _broken_rules(type(self), vars(self)))
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            if field.kind is Path:
                value = Path(value).expanduser()
            elif isinstance(value, list):
                value = [field.build(item) for item in value]
            object.__setattr__(self, field.name, field.build(value))

    @staticmethod
    def conflicts(values: dict[str, Any]) -> Iterator[str]:
        """What is wrong between fields; `values` holds those that are right each by itself."""
        yield from ()

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build from plain values, as JSON and YAML hold them; a section is a dict in a dict.

        Raises:
            ValueError: also for a missing key, and for an unknown one, with the nearest of its section, else of any.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{values!r} must be {_describe(cls, ())}")
        _refuse(cls, [*_unknown_keys(values, list(_dotted_names(cls))), *_broken_rules(cls, values)])
        return cls(**{field.name: values.get(field.name, field.default()) for field in _fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        return dataclasses.asdict(self, dict_factory=_plain)  # type: ignore[call-overload]


def _refuse(cls: type, problems: Iterable[str]) -> None:
    if found := list(problems):
        raise ValueError(f"{cls.__name__}: " + "; ".join(found))


def _broken_rules(cls: Any, values: dict[str, Any]) -> Iterator[str]:
    right = {}
    for field in _fields(cls):
        value = values.get(field.name, field.default())
        if value is dataclasses.MISSING:
            broken = [f"{field.name} is missing"]
        elif not _fits(value, field.kind, field.rules):
            broken = [field.problem(value)]
        else:
            parts = _sections(field.name, value)
            broken = [f"{name}.{problem}" for name, part in parts for problem in _broken_rules(field.section, part)]
        yield from broken
        if not broken:
            right[field.name] = value
    yield from cls.conflicts(right)


def _sections(name: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The sections in a value that are still dicts, each with its name."""
    named = [(f"{name}[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else []
    return [(name, part) for name, part in named or [(name, value)] if isinstance(part, dict)]


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in items}


@dataclass(frozen=True)
class _Field:
    name: str
    kind: Any
    rules: tuple[Rule, ...]
    default: Callable[[], Any]
    """Without a default, {} for a section, whose own fields are then missing, else MISSING."""
    section: Any
    """The class of settings that a section, or each item of a list, holds; None for a plain field."""

    def build(self, value: Any) -> Any:
        return self.section.from_dict(value) if self.section and isinstance(value, dict) else value

    def problem(self, value: Any) -> str:
        return f"{self.name} ({value!r}) must be {_describe(self.kind, self.rules)}{_nearest_choice(value, self.kind)}"


def _fields(cls: Any) -> Iterator[_Field]:
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        rules = tuple(extra for extra in extras if isinstance(extra, Rule))
        items = [get_args(each)[0] if get_origin(each) is list else each for each in _alternatives(kind)]
        section = next(filter(_is_section, items), None)
        default = field.default_factory
        if default is dataclasses.MISSING:
            required = field.default is dataclasses.MISSING
            default = dict if required and _is_section(kind) else lambda value=field.default: value
        yield _Field(field.name, kind, rules, default, section)


def _dotted_names(cls: Any, path: str = "") -> Iterator[str]:
    for field in _fields(cls):
        yield path + field.name
        if field.section:
            yield from _dotted_names(field.section, f"{path}{field.name}.")


def _unknown_keys(values: Any, known: list[str], path: str = "") -> Iterator[str]:
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{path}{key}"
        if name not in known:
            yield f"{name} is unknown{_nearest_key(str(key), known, path)}"
        elif any(other.startswith(f"{name}.") for other in known):
            for part in value if isinstance(value, list) else [value]:
                yield from _unknown_keys(part, known, f"{name}.")


def _nearest_key(key: str, known: list[str], path: str) -> str:
    siblings = {name.removeprefix(path): name for name in known if name.rpartition(".")[0] == path.rstrip(".")}
    for names in (siblings, {name.rpartition(".")[2]: name for name in known}):
        if close := difflib.get_close_matches(key, names, n=1):
            return f" (did you mean {names[close[0]]}?)"
    return f": choose from {', '.join(siblings)}"


def _nearest_choice(value: Any, kind: Any) -> str:
    choices = [choice for each in _alternatives(kind) for choice in _choices(each)]
    wrong = next((str(item) for item in (value if isinstance(value, list) else [value]) if item not in choices), "")
    close = difflib.get_close_matches(wrong, choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is list:
        return _choices(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ()


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def _fits(value: Any, kind: Any, rules: tuple[Rule, ...]) -> bool:
    if len(alternatives := _alternatives(kind)) > 1:
        return any(_fits(value, each, rules) for each in alternatives)
    if kind is NoneType or get_origin(kind) is Literal:
        return value in (get_args(kind) or (None,))
    if get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            return False
        of_items = tuple(rule for rule in rules if not rule.of_list)
        fit = all(_fits(item, get_args(kind)[0], of_items) for item in value)
        return fit and all(rule.holds(value) for rule in rules if rule.of_list)
    if _is_section(kind):
        return isinstance(value, kind | dict)  # a dict's own fields are checked one by one
    types = {float: (int, float), Path: (Path, str)}.get(kind, kind)
    right_type = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    return right_type and all(rule.holds(value) for rule in rules if not rule.of_list)


_NOUNS = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("text", "texts")}
_NOUNS |= {Path: ("a path", "paths"), bool: ("true or false", ""), NoneType: ("null", "")}


def _describe(kind: Any, rules: tuple[Rule, ...], *, plural: bool = False) -> str:
    if len(alternatives := _alternatives(kind)) > 1:
        return ", or ".join(_describe(each, rules) for each in alternatives)
    if _is_section(kind):
        names = ", ".join(field.name for field in dataclasses.fields(kind))
        return f"sections ({names})" if plural else f"a section ({names})"
    if get_origin(kind) is Literal:
        return ("values among " if plural else "one of ") + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        words = ["a non-empty list of", _describe(get_args(kind)[0], rules, plural=True)]
        return " ".join(words + [rule.text for rule in rules if rule.of_list])
    ends = [] if kind is NoneType else [rule.text for rule in rules if not rule.of_list]
    return " ".join([_NOUNS[kind][plural], " and ".join(ends)]).strip()
