"""What several processes must have in common before they train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras_dalign.head import data
from keras_dalign.numerics.replicas import replicas_of

if TYPE_CHECKING:
    from keras_dalign.training.aligned_model import AlignedModel


def check_processes(
    model: AlignedModel, x: Any, y: Any, sample_weight: Any, options: dict[str, Any]
) -> None:
    """Compares model, options and arrays of all processes that share the model.

    Streams are not read for it; how many samples they held, and with which targets, the
    solver compares.

    Args:
        model: The model.
        x: Inputs: arrays or a stream.
        y: Targets, for arrays.
        sample_weight: Sample weights, for arrays.
        options: Whatever else decides on what is computed.

    Raises:
        ValueError: If the processes were given different things.
    """
    replicas = replicas_of(model.head)
    if replicas.processes == 1:
        return
    head = model.head
    names = (
        *("units", "width", "requested_width", "n_samples", "gates", "share_gates"),
        *("slope", "seed", "phase", "compute_dtype", "output_dtype"),
    )
    facts: dict[str, Any] = {
        "heads": {
            "features": head.dim - 1,
            **{name: getattr(head, name) for name in names},
        },
        "weights": list(model.weights),
        "options": options,
    }
    if data.is_arrays(x):
        facts |= {"inputs": x, "targets": y, "sample weights": sample_weight}
    replicas.check_alike(facts)
