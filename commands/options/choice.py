"""A block of options as one value: what the command line says of a subject, in a frozen dataclass.

In: click's options. Out: a decorator that adds them to a command. Knows no option.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

Function = Callable[..., None]
Decorator = Callable[[Function], Function]


def gathered(choice: type[Any], name: str, *options: Decorator) -> Decorator:
    """Options that a command gets as one argument.

    Args:
        choice: the dataclass; it has a field for every option, under the name of its parameter.
        name: of the command's argument that is the choice.
        options: in the order of the help page.
    """
    own = [field.name for field in fields(choice)]

    def add(command: Function) -> Function:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            chosen = choice(**{field: values.pop(field) for field in own})
            command(**{name: chosen}, **values)

        found: Function = called
        for option in reversed(options):
            found = option(found)
        return found

    return add
