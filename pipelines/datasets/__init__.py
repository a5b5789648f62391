"""Data sets: loading, checks and storage.

Images are uint8 until they are read for training. Another data set is an entry of
`known.KNOWN`; those that tensorflow-datasets has need nothing else. One that it lacks
is a builder as in `semeion_builder`, or a function as in `digits`. TensorFlow is
imported by `load` alone.
"""

from pipelines.datasets.check import check
from pipelines.datasets.dataset import PARTS, Dataset
from pipelines.datasets.digits import load_digits
from pipelines.datasets.known import KNOWN, Known
from pipelines.datasets.load import load
from pipelines.datasets.pixels import Pixels
from pipelines.datasets.samples import Samples
from pipelines.datasets.storage import cited, read, write

__all__ = [
    "KNOWN",
    "PARTS",
    "Dataset",
    "Known",
    "Pixels",
    "Samples",
    "check",
    "cited",
    "load",
    "load_digits",
    "read",
    "write",
]
