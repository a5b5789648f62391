"""The saved state of an alignment head: its names, its shapes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_dalign.numerics.arguments import shown

PHASE_INDEX = "phase_index"
# The variables of the gated units.
UNIT_VARIABLES = ("bias", "q", "r", "w")
# The values of the phase index. The last one also says that gated units replace the
# output layer.
EXPLORING_INDEX, EXPLOITING_INDEX, REPLACED_INDEX = 0, 1, 2


def read_state(store: Any) -> dict[str, np.ndarray]:
    """Reads the saved variables of a head.

    Args:
        store: A mapping from names to arrays. Files of version 0.1.0, whose names are
            numbers, are read, too.

    Returns:
        The arrays by name: `phase_index` and, if units were saved, `UNIT_VARIABLES`.

    Raises:
        ValueError: If they are not those of a head.
    """
    found = {name: np.asarray(store[name]) for name in store.keys()}  # noqa: SIM118
    if PHASE_INDEX not in found:
        names = {str(i): name for i, name in enumerate((*UNIT_VARIABLES, PHASE_INDEX))}
        if set(found) != set(names):
            raise ValueError(
                "The saved variables are not those of an alignment head. Received: "
                f"{sorted(found)}"
            )
        found = {names[number]: array for number, array in found.items()}
    return found


def checked_phase(index: np.ndarray) -> int:
    """Checks a saved phase index.

    Args:
        index: The index, an array of shape `()`.

    Returns:
        The index.

    Raises:
        ValueError: If it is unknown.
    """
    known = (EXPLORING_INDEX, EXPLOITING_INDEX, REPLACED_INDEX)
    if index.shape or index.item() not in known:
        received = shown(index) if index.shape else index.item()
        raise ValueError(
            f"The saved phase of a head must be from 0 to {REPLACED_INDEX}. Received: "
            f"{received}. The file is damaged, or of a later version."
        )
    return int(index)


def check_shapes(
    found: dict[str, np.ndarray],
    expected: dict[str, tuple[int, ...]],
    *,
    gates: str,
    share_gates: bool,
) -> None:
    """Checks that saved units have the shapes of a head's units.

    Args:
        found: The saved variables.
        expected: The shapes of the head's units, by name.
        gates: The head's kind of gates, for the error.
        share_gates: Whether its outputs share gates, for the error.

    Raises:
        ValueError: If they have not.
    """
    shapes = {n: array.shape for n, array in found.items() if n in UNIT_VARIABLES}
    if shapes != expected:
        raise ValueError(
            "The saved units are those of another head. This one has shapes "
            f"{expected}, with gates='{gates}' and share_gates={share_gates}. "
            f"Received: {shapes}. Align as it was done when they were saved; heads of "
            "version 0.1.0 have share_gates=False."
        )


def refuse_hdf5() -> None:
    """Refuses to save a whole model in Keras's legacy format.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "A model with an alignment head cannot be saved in the legacy HDF5 format, "
        "which has no place for its phase and would not load. Received: a `filepath` "
        "that ends in .h5 or .hdf5. Save the model as 'model.keras', or its weights as "
        "'model.weights.h5'."
    )
