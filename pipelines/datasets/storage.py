"""Prepared data sets as files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import files
from pipelines.datasets.dataset import PARTS, Dataset
from pipelines.datasets.pixels import Pixels
from pipelines.datasets.samples import Samples

if TYPE_CHECKING:
    from pipelines.layout import Layout


def write(
    layout: Layout, name: str, data: Pixels, description: Mapping[str, Any]
) -> None:
    """Writes a data set and its description.

    The description is written last. A process that is killed in between leaves arrays
    that do not fit the description, which `read` refuses.

    Args:
        layout: Where the files are.
        name: Name of the data set.
        data: The data.
        description: The description from `load`.
    """
    files.write_arrays(layout.arrays(name), data.arrays())
    files.write_json(layout.description(name), description)


def read(layout: Layout, name: str) -> tuple[Dataset, Mapping[str, Any]]:
    """Reads a prepared data set and its description.

    Args:
        layout: Where the files are.
        name: Name of the data set.

    Returns:
        The data, images in float32, and their description.

    Raises:
        ValueError: If the arrays are not those that were described.
    """
    description = files.read_json(
        layout.description(name), "sha256", "synthetic", "pixel_scale", "title"
    )
    path = layout.arrays(name)
    x_train, y_train, x_test, y_test = files.read_arrays(path, *PARTS)
    data = Pixels(
        Samples(x_train, y_train),
        Samples(x_test, y_test),
        pixel_scale=float(description["pixel_scale"]),
        synthetic=bool(description["synthetic"]),
    )
    if data.fingerprint() != description["sha256"]:
        raise ValueError(
            f"{path} does not belong to its description. Received: sha256 "
            f"{data.fingerprint()} where {description['sha256']} was prepared. Run "
            "`prepare` again."
        )
    return data.dataset(), description


def cited(description: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that results contain.

    Args:
        description: The description from `read`.

    Returns:
        `title`, `source`, `data_sha256`, and whether they are `partial` or `synthetic`.
    """
    named = {key: description[key] for key in ("title", "source")}
    flags = {key: bool(description[key]) for key in ("partial", "synthetic")}
    return {**named, **flags, "data_sha256": description["sha256"]}
