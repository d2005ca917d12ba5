"""Methods that take the fields of a request: those are written in the request's class alone."""

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner")
Made = TypeVar("Made")


def with_fields(
    make: Callable[P, Made],
) -> Callable[[Callable[[Owner, Made], R]], Callable[Concatenate[Owner, P], R]]:
    """Turns a method of what `make` makes into one that takes the arguments of `make`."""

    def wrap(method: Callable[[Owner, Made], R]) -> Callable[Concatenate[Owner, P], R]:
        def call(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
            return method(owner, make(*args, **kwargs))

        functools.update_wrapper(call, method)
        own = next(iter(inspect.signature(method).parameters.values()))
        shown = inspect.signature(method).replace(parameters=[own, *inspect.signature(make).parameters.values()])
        call.__signature__ = shown  # type: ignore[attr-defined]  # for help() and editors
        return call

    return wrap
