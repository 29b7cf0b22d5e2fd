"""Extend the class of a module that exists, in place."""

from __future__ import annotations

import functools
from typing import Any, ClassVar


class Extension:
    """Base of the classes that are put in front of a dense class.

    The resulting classes are made at run time, one for each dense class, and named `prefix` + the dense name.
    """

    prefix: ClassVar[str]
    dense_class: ClassVar[type]
    extension: ClassVar[type]

    @classmethod
    def namespace(cls, dense: Any) -> dict[str, Any]:
        """Attributes of the extended class that depend on the dense one."""
        return {}

    def __reduce__(self) -> Any:
        # pickle and deepcopy find classes by name, and these are not attributes of a module.
        return _new, (type(self).dense_class, type(self).extension), self.__dict__


@functools.cache
def extended(dense: Any, extension: Any) -> Any:
    """The class of an extension in front of a dense class; one for each pair."""
    namespace = {"__module__": extension.__module__, "dense_class": dense, "extension": extension}
    return type(extension.prefix + dense.__name__, (extension, dense), namespace | extension.namespace(dense))


def extend_class(module: Any, extension: Any) -> None:
    """Give a module the extended class.

    Raises:
        ValueError: when the module's forward was replaced on the instance, which would hide the new class.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"{type(module).__name__} has a forward of its own, put there by another library: craft the model before "
            "that library wraps it"
        )
    dense: Any = type(module)
    module.__class__ = extended(dense, extension)


def _new(dense: Any, extension: Any) -> Any:
    made = extended(dense, extension)
    return made.__new__(made)
