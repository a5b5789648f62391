"""Checks before several devices or processes train one model."""

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

    Streams are not read. The solver compares their samples and targets later.

    Args:
        model: The model.
        x: Inputs: arrays or a stream.
        y: Targets, for arrays.
        sample_weight: Sample weights, for arrays.
        options: All other arguments that change the result.

    Raises:
        ValueError: If the processes got different ones.
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


def check_batches(model: AlignedModel, n: int, batch_size: int) -> None:
    """Checks that Keras can share each batch among the devices, on JAX.

    Args:
        model: The model.
        n: Number of samples.
        batch_size: Samples per batch.

    Raises:
        ValueError: If the devices do not divide a batch, the last one included.
    """
    divisor = replicas_of(model.head).batch_divisor
    for rows in (min(batch_size, n), n % batch_size):
        if rows % divisor:
            raise ValueError(
                "On JAX, Keras trains and evaluates in batches that the devices must "
                f"divide. Received: {n} samples in batches of {batch_size}, one of "
                f"them of {rows} samples, for {divisor} devices. Pass a `batch_size` "
                f"and a number of samples that {divisor} divides, or explore on one "
                "device: `solve` takes any number of samples."
            )
