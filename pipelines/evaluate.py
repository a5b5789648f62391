"""Stage 4: test error, calibration, training loss and certified gap of a run.

Needs NumPy only, so it is fast. The training loss is recomputed in float64 from the
logits, independently of the certificate. The measures of the probabilities on the test
data are their negative log likelihood, calibration error and Brier score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines import datasets, files
from pipelines.calibration import brier, ece, nll
from pipelines.layout import Layout
from pipelines.params import Run, parser


def main(
    dataset: str, augmentation: str, method: str, seed: int, *, root: Path = Path()
) -> Path:
    """Evaluates a run.

    Args:
        dataset: Name of its data set.
        augmentation: Name of its augmentation.
        method: Name of its method.
        seed: Its seed.
        root: The folder of all files.

    Returns:
        The path of the metrics.

    Raises:
        ValueError: If the run was made with other data, or its certificate does not
            belong to its logits.
    """
    layout, run = Layout(root), Run(dataset, augmentation, method, seed)
    data, description = datasets.read(layout, dataset)
    provenance = files.read_json(layout.provenance(run), "data_sha256", "synthetic")
    if provenance["data_sha256"] != description["sha256"]:
        raise ValueError(
            f"The run {run.name} was made with other data than those in "
            f"{layout.arrays(dataset)}. Received: sha256 "
            f"{provenance['data_sha256']}. Train it again."
        )
    certificate = files.read_json(layout.certificate(run), "loss", "lower_bound", "gap")
    on_train, on_test = files.read_arrays(layout.logits(run), "train", "test")
    train_loss = nll(on_train, data.y_train)
    # Logits are float32: the loss differs in the order of their rounding.
    if not np.isclose(train_loss, certificate["loss"], rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"The certificate of the run {run.name} does not belong to its logits. "
            f"Received: certified loss {certificate['loss']}, loss of the logits "
            f"{train_loss}"
        )
    history = files.read_json(
        layout.history(run), "curves", "parameters", "l2", "switch", "temperature"
    )
    metrics = {
        "error_rate": error_rate(on_test, data.y_test),
        "nll": nll(on_test, data.y_test),
        "ece": ece(on_test, data.y_test),
        "brier": brier(on_test, data.y_test),
        "train_loss": train_loss,
        "train_error_rate": error_rate(on_train, data.y_train),
        "lower_bound": certificate["lower_bound"],
        "gap": certificate["gap"],
        "temperature": history["temperature"],
        "l2": history["l2"],
        "l2_loss": certificate.get("l2_loss"),
        "l2_gap": certificate.get("l2_gap"),
        "parameters": history["parameters"],
        "switch": history["switch"],
        "curves": history["curves"],
        "provenance": provenance,
    }
    files.write_json(layout.metrics(run), metrics)
    return layout.metrics(run)


def error_rate(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong classifications.

    Args:
        logits: Shape `(n, classes)`.
        labels: Int labels, shape `(n,)`.

    Returns:
        A number in [0, 1].
    """
    return float(np.mean(logits.argmax(axis=1) != labels))


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    names = ("dataset", "augmentation", "method", "seed")
    line = parser(__doc__, *names).parse_args(arguments)
    main(line.dataset, line.augmentation, line.method, line.seed, root=line.root)


if __name__ == "__main__":
    cli()
