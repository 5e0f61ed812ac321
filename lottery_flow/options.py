"""Calling a method by the names of its arguments.

A method of `sparsity` is a function in a dict. What a configuration knows (the steps
that rewire, the weights of each layer, ...) is given to the arguments of these names;
any other argument is an option of the method, written as `rounds=10,invert=True`. So a
new method needs no new field, and no line of code that calls it.
"""

import ast
import inspect
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lottery_flow.errors import UserError

_WRITTEN = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a word",
}
_LARGEST = 3.4e38  # of float32, which all of them become


def parse(field: str, text: str) -> dict[str, Any]:
    """The options in `name=value,name=value`: Python's numbers, True, or words.

    Raises:
      UserError: a part that has no name or no value, or a name twice.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (p.strip() for p in part.partition("="))
        is_name = name.replace("/", "_").isidentifier()  # layers have paths
        if not equals or not is_name or not value or name in found:
            raise UserError(
                f"{field}={text!r}: write name=value,name=value, each name once"
            )
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            found[name] = value
    return found


def call(field: str, make: Callable, given: Mapping[str, Callable], text: str) -> Any:
    """`make(...)` with what it asks for by name.

    Args:
      field: of the options, for messages: `sparsity.rule_options`.
      make: a method; its keyword arguments say what it needs.
      given: by name of an argument, a function that returns it. An option of the same
        name comes before it, where the argument says of which kind it is.
      text: options, see `parse`.

    Raises:
      UserError: an option that the method has not, or lacks; whatever it refuses.
    """
    asked = check(field, make, given, text)
    for name in arguments(make):
        if name in given and name not in asked:
            asked[name] = given[name]()
    try:
        return make(**asked)
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}: {error}") from error


def check(
    field: str, make: Callable, given: Collection[str], text: str
) -> dict[str, Any]:
    """The options of a method, which is not called yet.

    Raises:
      UserError: an option that the method has not, or lacks, or of another kind than
        its annotation, or else its default, says.
    """
    own = arguments(make)
    asked = parse(field, text)
    for name, value in asked.items():
        kinds = _kinds(own[name]) if name in own else ()
        if kinds == () or (name in given and kinds is None):
            free = [k for k, v in own.items() if k not in given and _kinds(v) != ()]
            raise UserError(
                f"{field}: {name} is no option here; "
                + (f"there are {', '.join(free)}" if free else "leave it empty")
            )
        if not _fits(value, kinds):
            raise UserError(f"{field}={text!r}: give {name}={_told(kinds)}")
        if kinds and float in kinds and type(value) is int:
            asked[name] = float(value)
    for name, parameter in own.items():
        if name not in given and name not in asked:
            if parameter.default is parameter.empty:
                raise UserError(f"{field}: {name} is missing; write {name}=...")
    return asked


def _kinds(parameter: inspect.Parameter) -> tuple[Any, ...] | None:
    """Types, or words, that an argument takes as text; None: it does not say."""
    said = parameter.annotation
    if said is parameter.empty:
        default = parameter.default
        said = None if default in (parameter.empty, None) else type(default)
    if said is None or isinstance(said, str):
        return None
    if get_origin(said) is Literal:
        return get_args(said)
    parts = get_args(said) if get_origin(said) in (Union, UnionType) else (said,)
    return tuple(kind for kind in _WRITTEN if kind in parts)


def _fits(value: Any, kinds: tuple[Any, ...] | None) -> bool:
    if isinstance(value, float | int) and not abs(value) <= _LARGEST:
        return False
    if kinds is None:
        return isinstance(value, tuple(_WRITTEN))
    if type(value) in kinds or (type(value) is int and float in kinds):
        return True
    return isinstance(value, str) and value in kinds


def _told(kinds: tuple[Any, ...] | None) -> str:
    if kinds is None:
        return "a number, True, False or a word"
    return " or ".join(_WRITTEN.get(k, str(k)) for k in kinds)


def arguments(make: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a method, by name."""
    return dict(inspect.signature(make).parameters)
