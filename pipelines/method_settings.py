"""The settings of methods in params.yaml, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipelines.sections import is_number

if TYPE_CHECKING:
    from pipelines.mistakes import Mistakes

# The epochs of a base that takes as long as our default; see `TrainParams.short`.
SHORT = "short"
# Exploitation by the solver.
SOLVE = "solve"

# The arguments of `keras_dalign.align` that methods with a head take as settings.
HEAD = ("features", "layer", "share_gates", "slope", "width")

# The settings of each kind of method: the keyword arguments of its function in
# `methods.KINDS`.
SETTINGS = {
    "base": ("average", "epochs", "reestimate", "temperature"),
    "last_layer": ("explore",),
    "two_phase": ("average", "exploit", "explore", "gates", "l2", *HEAD),
}


def is_share(value: Any) -> bool:
    """Whether a value is a number above 0 and at most 1."""
    return is_number(value) and 0 < value <= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


# By setting: what it must be, and whether a value is that.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "average": ("true or false", _is_flag),
    "reestimate": ("true or false", _is_flag),
    "temperature": (
        "the share of the training samples to fit it on, above 0 and below 1",
        lambda value: is_share(value) and value < 1,
    ),
    "epochs": (
        f"a positive multiple of the epochs, or {SHORT!r}",
        lambda value: value == SHORT or (is_number(value) and value > 0),
    ),
    "explore": ("a share of the epochs, above 0 and at most 1", is_share),
    "exploit": (f"'copy' or {SOLVE!r}", lambda value: value in ("copy", SOLVE)),
    "gates": ("'random' or 'learned'", lambda value: value in ("random", "learned")),
    "l2": (
        "a number of at least 0, or 'auto'",
        lambda value: value == "auto" or (is_number(value) and value >= 0),
    ),
}


def check_method(name: str, settings: Mapping[str, Any], mistakes: Mistakes) -> None:
    """Checks the settings of a method.

    Args:
        name: Name of the method.
        settings: Its `kind`, and settings of that kind.
        mistakes: Gets what is wrong.
    """
    where = f"methods.{name}"
    kind = settings.get("kind")
    if "kind" in settings and kind not in SETTINGS:
        mistakes.check_choice(f"kind of method (of `{where}`)", SETTINGS, kind)
    anything = {name for names in SETTINGS.values() for name in names}
    known = SETTINGS.get(kind, anything) if isinstance(kind, str) else anything
    mistakes.check_keys(where, settings, ["kind"], known)
    for key, (wanted, fits) in _RANGES.items():
        if key in settings and not fits(settings[key]):
            mistakes.add(
                f"`{where}.{key}` must be {wanted}. Received: {settings[key]!r}"
            )
    if settings.get("average") and settings.get("gates") == "learned":
        mistakes.add(
            "The shared exploration keeps an average of the weights, and learned gates "
            f"explore by themselves. Received: `average` in `{where}`. Leave it out, "
            "or take random gates."
        )
