"""Calling a method by the names of its arguments.

A method of `sparsity` is a function in a dict. What a configuration knows (the steps
that rewire, the weights of each layer, ...) is given to the arguments of these names;
any other argument is an option of the method, written as `rounds=10,invert=True`. So a
new method needs no new field, and no line of code that calls it.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lottery_flow.errors import UserError


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
        except (SyntaxError, ValueError):
            found[name] = value
    return found


def call(field: str, make: Callable, given: Mapping[str, Callable], text: str) -> Any:
    """`make(...)` with what it asks for by name.

    Args:
      field: of the options, for messages: `sparsity.rule_options`.
      make: a method; its keyword arguments say what it needs.
      given: by name of an argument, a function that returns it. An option of the same
        name comes before it.
      text: options, see `parse`.

    Raises:
      UserError: an option that the method has not, or lacks; whatever it refuses.
    """
    own = arguments(make)
    asked = parse(field, text)
    for name in asked:
        if name not in own:
            free = [k for k in own if k not in given]
            raise UserError(
                f"{field}: {name} is no option here; "
                + (f"there are {', '.join(free)}" if free else "leave it empty")
            )
    for name, parameter in own.items():
        if name in given and name not in asked:
            asked[name] = given[name]()
        elif name not in asked and parameter.default is parameter.empty:
            raise UserError(f"{field}: {name} is missing; write {name}=...")
    try:
        return make(**asked)
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}: {error}") from error


def arguments(make: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a method, by name."""
    return dict(inspect.signature(make).parameters)
