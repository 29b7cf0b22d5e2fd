"""Settings: dataclasses that carry each field's rule beside the field, and check it when they are built.

A field is written `learning_rate: Annotated[float, above(0)] = 2e-4`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
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


class SettingsError(ValueError):
    """Settings that break their rules.

    Args:
        title: of the settings.
        problems: each text begins with the name of a field.
    """

    def __init__(self, title: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__(f"{title}: " + "; ".join(self.problems))


class Settings:
    """Base of a dataclass of settings.

    A field's type is int, float, bool, str, Path, a Literal of texts, a list of these, or other `Settings` (a
    section); or a union of these and None. Types are strict: True is no integer, and "4" is none. Only a path may be
    given as text, and its ~ is expanded. A list must not be empty.

    Raises:
        SettingsError: a ValueError that lists every field that breaks its rule.
    """

    def __post_init__(self) -> None:
        fields = _fields(type(self))
        problems = {field.name: p for field in fields if (p := field.problem(getattr(self, field.name)))}
        if texts := [*problems.values(), *self.conflicts(problems.keys())]:
            raise SettingsError(type(self).__name__, texts)
        for field in fields:
            if field.kind is Path:
                object.__setattr__(self, field.name, Path(getattr(self, field.name)).expanduser())

    def conflicts(self, broken: Collection[str]) -> Iterator[str]:
        """Rules between fields that are broken, a text each that begins with the name of a field.

        Args:
            broken: names of the fields that break a rule of their own.
        """
        yield from ()

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build from plain values, as JSON and YAML hold them; a section is a dict in a dict.

        Raises:
            SettingsError: also for a missing key, and for an unknown one, naming the nearest known one of any section.
        """
        problems = list(_unknown_keys(values, list(_dotted_names(cls))))
        try:
            built = _build(cls, values)
        except SettingsError as error:
            problems += error.problems
        if problems:
            raise SettingsError(cls.__name__, problems)
        return built

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        return dataclasses.asdict(self, dict_factory=_plain)  # type: ignore[call-overload]


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in items}


@dataclass(frozen=True)
class _Field:
    name: str
    kind: Any
    rules: tuple[Rule, ...]
    required: bool
    section: Any
    """The class of settings that a section holds; None for a plain field."""

    def problem(self, value: Any) -> str | None:
        if _fits(value, self.kind, self.rules):
            return None
        return f"{self.name} ({value!r}) must be {_describe(self.kind, self.rules)}{_nearest_choice(value, self.kind)}"


def _fields(cls: Any) -> list[_Field]:
    fields, hints = [], get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        rules = tuple(extra for extra in extras if isinstance(extra, Rule))
        required = field.default is field.default_factory is dataclasses.MISSING
        section = next((each for each in _alternatives(kind) if _is_section(each)), None)
        fields.append(_Field(field.name, kind, rules, required, section))
    return fields


def _build(cls: Any, values: Any) -> Any:
    """An instance; unknown keys are passed over. A SettingsError names every problem by its dotted key."""
    if not isinstance(values, dict):
        raise SettingsError(cls.__name__, [f"({values!r}) must be {_describe(cls, ())}"])
    built, problems = {}, []
    for field in _fields(cls):
        if field.name not in values and not field.required:
            continue
        value = values.get(field.name, {})
        if field.section and isinstance(value, dict):
            try:
                built[field.name] = _build(field.section, value)
            except SettingsError as error:
                problems += [f"{field.name}.{problem}" for problem in error.problems]
        elif field.name not in values:
            problems.append(f"{field.name} is missing")
        elif problem := field.problem(value):
            problems.append(problem)
        else:
            built[field.name] = value
    if problems:
        raise SettingsError(cls.__name__, problems)
    return cls(**built)


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
            yield from _unknown_keys(value, known, f"{name}.")


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
    types = {float: (int, float), Path: (Path, str)}.get(kind, kind)
    right_type = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    return right_type and all(rule.holds(value) for rule in rules if not rule.of_list)


_NOUNS = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("text", "texts")}
_NOUNS |= {Path: ("a path", "paths"), bool: ("true or false", ""), NoneType: ("null", "")}


def _describe(kind: Any, rules: tuple[Rule, ...], *, plural: bool = False) -> str:
    if len(alternatives := _alternatives(kind)) > 1:
        return ", or ".join(_describe(each, rules) for each in alternatives)
    if _is_section(kind):
        return f"a section ({', '.join(field.name for field in dataclasses.fields(kind))})"
    if get_origin(kind) is Literal:
        return ("values among " if plural else "one of ") + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        words = ["a non-empty list of", _describe(get_args(kind)[0], rules, plural=True)]
        return " ".join(words + [rule.text for rule in rules if rule.of_list])
    ends = [] if kind is NoneType else [rule.text for rule in rules if not rule.of_list]
    return " ".join([_NOUNS[kind][plural], " and ".join(ends)]).strip()
