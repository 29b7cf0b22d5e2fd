"""Rules beside fields: strict types, every problem at once, and unknown keys answered with the nearest known one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from pesc.rules import ASCENDING, Settings, above, at_least, below


@dataclass(frozen=True, kw_only=True)
class Engine(Settings):
    power: Annotated[int, at_least(1)]
    fuel: Literal["petrol", "diesel"] = "petrol"


@dataclass(frozen=True, kw_only=True)
class Car(Settings):
    name: str
    engine: Engine
    trailer: Engine | None = None
    spare: Engine = field(default_factory=lambda: Engine(power=2))
    length: Annotated[float, above(0), below(20)] = 4.0
    seats: Annotated[int | None, at_least(1)] = None
    doors: Annotated[list[int], at_least(0), ASCENDING] = field(default_factory=lambda: [0, 1])
    colours: list[Literal["red", "green"]] = field(default_factory=lambda: ["red"])
    electric: bool = False
    manual: Path = Path("manual")

    @staticmethod
    def conflicts(values: dict[str, Any]) -> Iterator[str]:
        if values.get("seats") == 13 and "length" in values:
            yield "seats (13) bring bad luck"


ENGINE: dict[str, Any] = {"power": 3}


def problems(**changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        Car.from_dict({"name": "one", "engine": ENGINE} | changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("name", 3, "text"),
        ("engine", None, "a section (power, fuel)"),
        ("engine", [3], "a section (power, fuel)"),
        ("trailer", 1, "a section (power, fuel), or null"),
        ("length", "4", "a number above 0 and below 20"),
        ("length", True, "a number above 0 and below 20"),
        ("length", 20, "a number above 0 and below 20"),
        ("length", float("nan"), "a number above 0 and below 20"),
        ("seats", 2.0, "an integer of at least 1, or null"),
        ("seats", False, "an integer of at least 1, or null"),
        ("doors", [1, 0], "a non-empty list of integers of at least 0 in ascending order, each once"),
        ("doors", [0, True], "a non-empty list of integers of at least 0 in ascending order, each once"),
        ("doors", [], "a non-empty list of integers of at least 0 in ascending order, each once"),
        ("doors", 1, "a non-empty list of integers of at least 0 in ascending order, each once"),
        ("colours", ["red", "gren"], "a non-empty list of values among red, green (did you mean 'green'?)"),
        ("electric", "yes", "true or false"),
        ("electric", 1, "true or false"),
        ("manual", 4, "a path"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_rule(field: str, value: Any, rule: str) -> None:
    assert problems(**{field: value}) == f"Car: {field} ({value!r}) must be {rule}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", 4), ("seats", 1), ("seats", None), ("trailer", None), ("doors", [0, 2]), ("electric", True)],
)
def test_a_value_that_fits_is_kept(field: str, value: Any) -> None:
    assert getattr(Car.from_dict({"name": "one", "engine": ENGINE, field: value}), field) == value


def test_sections_are_built_and_their_problems_are_named_by_dotted_key() -> None:
    car = Car.from_dict({"name": "one", "engine": ENGINE, "trailer": {"power": 1, "fuel": "diesel"}})
    assert car.trailer == Engine(power=1, fuel="diesel")
    assert car == Car(name="one", engine=Engine(power=3), trailer=car.trailer)
    assert car == Car(name="one", engine={"power": 3}, trailer={"power": 1, "fuel": "diesel"})
    assert problems(engine={"fuel": "diesl"}, spare={"power": 0}) == (
        "Car: engine.power is missing; engine.fuel ('diesl') must be one of petrol, diesel (did you mean 'diesel'?); "
        "spare.power (0) must be an integer of at least 1"
    )
    with pytest.raises(ValueError, match=r"Car: name is missing; engine.power is missing$"):
        Car.from_dict({})


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"nam": 1}, "nam is unknown (did you mean name?)"),
        ({"power": 1}, "power is unknown (did you mean spare.power?)"),
        ({"engine": ENGINE | {"powr": 1}}, "engine.powr is unknown (did you mean engine.power?)"),
        ({"engine": ENGINE | {"seat": 1}}, "engine.seat is unknown (did you mean seats?)"),
        ({"engine": ENGINE | {"zzz": 1}}, "engine.zzz is unknown: choose from power, fuel"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_of_its_section_else_of_any(values: dict, answer: str) -> None:
    assert problems(**values) == f"Car: {answer}"


def test_all_problems_come_together_but_conflicts_only_between_values_that_are_right() -> None:
    both = "Car: nam is unknown (did you mean name?); length (0) must be a number above 0 and below 20"
    assert problems(nam=1, length=0) == both
    assert problems(seats=13, length=0) == "Car: length (0) must be a number above 0 and below 20"
    assert problems(seats=13, name=3) == "Car: name (3) must be text; seats (13) bring bad luck"


def test_plain_values_go_through_json_and_back() -> None:
    car = Car(name="one", engine=Engine(power=3), manual=Path("~/m.pdf"))
    assert car.manual == Path.home() / "m.pdf"
    assert Car.from_dict(json.loads(json.dumps(car.to_dict()))) == car


def test_settings_cost_no_heavy_import() -> None:
    check = "import sys, pesc.config; print([m for m in ('torch', 'pydantic', 'yaml', 'cyclopts') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
