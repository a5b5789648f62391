"""Data sets by way of tensorflow-datasets. Imports TensorFlow."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

# Registers its builder.
import pipelines.datasets.semeion_builder  # noqa: F401
from pipelines import files
from pipelines.datasets import imported
from pipelines.datasets.samples import Samples

if TYPE_CHECKING:
    from pipelines.datasets.known import Known

_BATCH = 1000
# What a download may raise.
_FAILED = (OSError, DownloadError, NonMatchingChecksumError)


def versions() -> dict[str, str]:
    """The versions of the packages that made the data."""
    return {"tensorflow-datasets": version("tensorflow-datasets")}


def download(name: str, known: Known, folder: Path) -> tuple[dict[str, Samples], str]:
    """Downloads a data set, unless the folder has it.

    Args:
        name: Its name in tensorflow-datasets.
        known: The complete data set.
        folder: Where tensorflow-datasets stores it.

    Returns:
        The samples by part, and where they are from.

    Raises:
        ConnectionError: If the download fails.
    """
    builder = tfds.builder(name, data_dir=folder)
    if not builder.data_path.exists():
        print(
            f"Downloading {name}. Without internet it takes tensorflow-datasets some "
            "minutes to give up; `--import-from FOLDER` needs none."
        )
    try:
        with _explaining_a_full_disk(folder):
            builder.download_and_prepare(download_dir=folder / "downloads")
    except _FAILED as error:
        if isinstance(error, OSError) and error.errno in files.FULL_DISK:
            raise
        raise ConnectionError(
            f"{name} could not be downloaded: {error}\nIf the network was down, run "
            "the same command again: what was downloaded stays. Without internet, put "
            f"{imported.FORMAT}, into a folder, and name it: `--import-from FOLDER`, "
            f"or {imported.VARIABLE}=/absolute/path/of/FOLDER for `dvc repro`. For "
            f"example: FOLDER/{name}.npz with images of shape (n, "
            f"{', '.join(map(str, known.shape))})."
        ) from error
    return _read(name, known, folder), _source(builder)


def from_folder(
    name: str, known: Known, folder: Path, path: Path
) -> tuple[dict[str, Samples], str]:
    """Prepares a data set from a file by the builder that would download it.

    Args:
        name: Its name in tensorflow-datasets.
        known: The complete data set.
        folder: Where tensorflow-datasets keeps it, apart from downloads and from
            what was imported from other files.
        path: The file.

    Returns:
        The samples by part, and where they are from.
    """
    with path.open("rb") as opened:
        origin = hashlib.file_digest(opened, "sha256").hexdigest()
    own = folder / "imported" / origin[:16]
    builder = _importing(tfds.builder_cls(name), known)(data_dir=own)
    config = tfds.download.DownloadConfig(
        manual_dir=path.parent.resolve(), try_download_gcs=False
    )
    with _explaining_a_full_disk(own):
        builder.download_and_prepare(download_config=config)
    return _read(name, known, own), f"import folder, through {_source(builder)}"


@contextmanager
def _explaining_a_full_disk(folder: Path) -> Iterator[None]:
    """As for other files, whatever TensorFlow and tensorflow-datasets call it."""
    with files.explaining_a_full_disk(folder):
        try:
            yield
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            if _is_full_disk(error):
                raise OSError(errno.ENOSPC, str(error).strip()) from error
            raise


def _is_full_disk(error: BaseException) -> bool:
    # tensorflow-datasets looks how much room there is before it starts, and wraps the
    # errors of TensorFlow.
    return (
        isinstance(error, tf.errors.ResourceExhaustedError)
        or (isinstance(error, OSError) and "Not enough disk space" in str(error))
        or (error.__cause__ is not None and _is_full_disk(error.__cause__))
    )


def _source(builder: Any) -> str:
    return f"tensorflow-datasets {builder.name} {builder.version}"


def _importing(stock: Any, known: Known) -> Any:
    """A builder of the same data set that reads a file instead of downloading."""

    class Importing(stock, skip_registration=True):  # type: ignore[call-arg]
        """The same features and files, under the same name."""

        name = stock.name
        MANUAL_DOWNLOAD_INSTRUCTIONS = imported.FORMAT

        def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
            path = imported.file(Path(dl_manager.manual_dir), self.name)
            parts = imported.read(path, known)
            return {
                part: self._generate_examples(part, samples)
                for part, samples in parts.items()
            }

        def _generate_examples(
            self, part: str, samples: Samples
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            # Features that our files lack, and that nobody reads here: CIFAR's names
            # of images, and the unknown label of CIFAR-100's superclass.
            lacking: dict[str, Any] = {}
            if "coarse_label" in self.info.features:
                lacking["coarse_label"] = -1
            for i, (image, label) in enumerate(zip(samples.x, samples.y, strict=True)):
                if "id" in self.info.features:
                    lacking["id"] = f"{part}_{i:05d}"
                yield i, {"image": image, "label": int(label), **lacking}

    return Importing


def _read(name: str, known: Known, folder: Path) -> dict[str, Samples]:
    """Reads what was prepared: the same for downloads and imports."""
    loaded, info = tfds.load(
        name,
        split=list(known.classes),
        data_dir=folder,
        download=False,
        as_supervised=True,
        batch_size=_BATCH,
        with_info=True,
    )
    found = {}
    for part, batches in zip(known.classes, loaded, strict=True):
        n = info.splits[part].num_examples
        x, y = np.empty((n, *known.shape), "uint8"), np.empty(n, "int64")
        begin = 0
        for images, labels in tfds.as_numpy(batches):
            x[begin : begin + len(labels)] = images
            y[begin : begin + len(labels)] = labels
            begin += len(labels)
        if begin != n:
            raise ValueError(
                f"Expected {n} {part} samples of {name}. Received: {begin} in {folder}."
                " Delete that folder, and run `prepare` again."
            )
        found[part] = Samples(x, y).in_order_of_content()
    return found
