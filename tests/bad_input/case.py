"""A call that is wrong in one argument."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from bad_input.calls import CALLS
from bad_input.world import World

NAN, INF = float("nan"), float("inf")
ARRAY = np.zeros((30, 30))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that is wrong in one argument.

    Attributes:
        function: Name in `CALLS`.
        what: What is wrong, for the name of the test.
        change: Makes the wrong arguments from the world.
        words: Regular expression that the message matches: the name of the argument,
            what was received, and what to do.
        exception: The documented exception.
    """

    function: str
    what: str
    change: Callable[[World], dict[str, Any]]
    words: str
    exception: type[Exception] = ValueError

    def __str__(self):
        return f"{self.function}: {self.what}"

    def call(self, world):
        return CALLS[self.function](world, **self.change(world))


def values(functions, argument, words, *bad):
    """A case for each function and wrong value of one argument."""
    for function in functions.split():
        for value in bad:
            yield Case(
                function,
                f"{argument}={_short(value)}",
                lambda _, value=value: {argument: value},
                words,
            )


def data(functions, argument, what, make, words):
    """A case for each function, with one argument made from the world's data."""
    for function in functions.split():
        yield Case(
            function, f"{argument}, {what}", lambda w: {argument: make(w)}, words
        )


def _short(value):
    shape = getattr(value, "shape", None)
    return f"array{shape}" if shape else repr(value)[:30]
