"""scikit-learn's digits, which come in its wheel: the default, without a download."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from pipelines.datasets import sampling
from pipelines.datasets.known import KNOWN
from pipelines.datasets.pixels import Pixels
from pipelines.datasets.samples import Samples

if TYPE_CHECKING:
    from pipelines.datasets.dataset import Dataset
    from pipelines.params import DataParams

SOURCE = "scikit-learn digits"


def raw() -> Samples:
    """All of them.

    Returns:
        Images `(1797, 8, 8, 1)` of pixels in 0 ... 16, in scikit-learn's order.
    """
    from sklearn.datasets import load_digits as sklearn_digits  # noqa: PLC0415

    pixels, labels = sklearn_digits(return_X_y=True)
    return Samples(
        pixels.reshape(-1, *KNOWN["digits"].shape).astype("uint8"),
        labels.astype("int64"),
    )


def versions() -> dict[str, str]:
    """With what they were made."""
    return {"scikit-learn": version("scikit-learn")}


def load_digits(params: DataParams) -> Dataset:
    """The digits, split at random and stratified by class.

    Args:
        params: The sizes and the seed of the split.

    Returns:
        Images `(n_train, 8, 8, 1)` and `(n_test, 8, 8, 1)`.
    """
    train, test = sampling.split(
        raw(), params.n_train, params.n_test, params.split_seed
    )
    return Pixels(train, test, KNOWN["digits"].pixel_scale).dataset()
