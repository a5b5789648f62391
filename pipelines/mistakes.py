"""Mistakes in settings, collected so that one error reports all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any


class Mistakes:
    """A list of mistakes in one source of settings.

    Args:
        source: Where the settings come from, as the error's first words.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, mistake: str) -> None:
        """Adds a mistake, unless it is there already.

        Args:
            mistake: What must be, and what was received.
        """
        if mistake not in self._found:
            self._found.append(mistake)

    def check_keys(
        self,
        where: str,
        given: Collection[str],
        required: Iterable[str],
        optional: Iterable[str] = (),
    ) -> None:
        """Adds a mistake for each unknown key, and one for all that are missing.

        Args:
            where: Name of the section, empty at the top.
            given: Its keys.
            required: The keys that it must have.
            optional: The keys that it may have.
        """
        required, optional = sorted(required), sorted(optional)
        section = f"`{where}`" if where else "The file"
        for key in given:
            if key not in {*required, *optional}:
                hint = nearest(key, [*required, *optional])
                self.add(f"{section} has no key {key!r}{hint}")
        missing = [key for key in required if key not in given]
        if missing:
            self.add(
                f"{section} must have the keys {', '.join(required)}. Received: "
                f"{', '.join(map(str, given)) or 'none'}, without {', '.join(missing)}"
            )

    def check_choice(self, noun: str, choices: Collection[str], name: Any) -> None:
        """Adds a mistake if there is no choice of a name.

        Args:
            noun: What is chosen.
            choices: The names that there are.
            name: The name.
        """
        if name not in choices:
            self.add(unknown(noun, choices, name))

    def raise_if_any(self) -> None:
        """Raises an error with all mistakes.

        Raises:
            ValueError: If there are mistakes.
        """
        if self._found:
            count = f"{len(self)} mistakes" if len(self) > 1 else "a mistake"
            lines = "".join(f"\n- {mistake}" for mistake in self._found)
            raise ValueError(f"{self._source} has {count}:{lines}")


def unknown(noun: str, choices: Iterable[str], name: Any) -> str:
    """The text of the error for a name that is not among the choices.

    Args:
        noun: What is chosen.
        choices: The names that there are.
        name: The name.

    Returns:
        A sentence with the choices and the nearest of them.
    """
    names = sorted(choices)
    return (
        f"There is no such {noun}. Received: {name!r}; there are {', '.join(names)}"
        f"{nearest(name, names)}"
    )


def nearest(name: Any, choices: Iterable[str]) -> str:
    """The choice that is spelled most like a name, as the end of a sentence.

    Args:
        name: The name.
        choices: The names that there are.

    Returns:
        Such as `"; the nearest is 'epochs'"`, or nothing if none is similar.
    """
    found = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"; the nearest is {found[0]!r}" if found else ""
