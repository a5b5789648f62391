"""The complete data sets: counts, shapes and digests of their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The part of a data set that comes without a split into training and test samples.
WHOLE = "whole"


@dataclass(frozen=True)
class Known:
    """A complete data set: what a copy of it is checked against.

    Attributes:
        title: Its name for readers.
        shape: Height, width and channels of an image.
        classes: Number of samples by class, by part: `train` and `test`, or `WHOLE`
            for data without an official split.
        pixel_scale: What pixels are multiplied by to lie in [0, 1].
        content: `Samples.content` of the complete parts, as far as it is known.
        partial_content: The same of copies that are known to be incomplete.
        usual_split: Training and test samples, for data without an official split.
    """

    title: str
    shape: tuple[int, int, int]
    classes: Mapping[str, tuple[int, ...]]
    pixel_scale: float = 1 / 255
    content: Mapping[str, str] = field(default_factory=dict)
    partial_content: Mapping[str, str] = field(default_factory=dict)
    usual_split: tuple[int, int] | None = None

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(next(iter(self.classes.values())))

    def size(self, part: str) -> int:
        """Number of samples of a part."""
        return sum(self.classes[part])


_MNIST = (28, 28, 1)
_CIFAR = (32, 32, 3)

KNOWN: Mapping[str, Known] = {
    "digits": Known(
        title="digits",
        shape=(8, 8, 1),
        classes={WHOLE: (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)},
        pixel_scale=1 / 16,
        content={
            WHOLE: "f7f1581429d2af655373777f5a441a2ffb65d9f55720e6344539e5a44410abff"
        },
        usual_split=(1_200, 597),
    ),
    "semeion": Known(
        title="Semeion",
        shape=(16, 16, 1),
        classes={WHOLE: (161, 162, 159, 159, 161, 159, 161, 158, 155, 158)},
        pixel_scale=1.0,
        content={
            WHOLE: "457a960abbb2c238368fa21b24a40ac9220134ac48fc924413df344afa6649f7"
        },
        usual_split=(1_000, 593),
    ),
    "mnist": Known(
        title="MNIST",
        shape=_MNIST,
        classes={
            "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
        },
        content={
            "train": "c8c557098bda3f569e7ca2934a98627647854d18512e6c39c2880bfb4eafae81",
            "test": "e3e89070710800de8ba5a5dcd798c3089119a28ef07b9ba4dfe1335603360969",
        },
    ),
    "kmnist": Known(
        title="KMNIST",
        shape=_MNIST,
        classes={"train": (6_000,) * 10, "test": (1_000,) * 10},
    ),
    "cifar10": Known(
        title="CIFAR-10",
        shape=_CIFAR,
        classes={"train": (5_000,) * 10, "test": (1_000,) * 10},
        content={
            "train": "4063f254e3afbb7150f96bf3eaa9aa99b9fbdc87ab98a763fffe544268920318",
            "test": "801642351c3336282ea5b7452a1dbf9c6af0a5a8d244e56db1738a421023df9f",
        },
    ),
    "cifar100": Known(
        title="CIFAR-100",
        shape=_CIFAR,
        classes={"train": (500,) * 100, "test": (100,) * 100},
        # A half, balanced by class. The content of the whole was never measured.
        partial_content={
            "train": "1df89d283642158d5ad99f08cf3ab443a8fa1ea8b0368de9a4ce2778fb632e1e",
            "test": "f09da496ca70b4a2a7eafe285f0ad83961b328f8bcfa04737f0c2f122fdb4fd5",
        },
    ),
    "svhn_cropped": Known(
        title="SVHN",
        shape=_CIFAR,
        classes={
            "train": (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
            "test": (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        },
    ),
}
