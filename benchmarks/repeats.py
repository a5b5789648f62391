"""Repeated images: `certify` finds them, and their conflicts give a lower bound.

The training images of CIFAR-100 contain repeats. They are counted in three ways: by
`certify`, by sorting the bytes of whole images, and by comparing images with equal sums
in pairs. Then some of them get conflicting labels, and the lower bound of the loss is
compared with its closed form: `k` samples of one input, of which `k_c` have label `c`,
add `sum_c k_c log(k / k_c)`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks import common
from benchmarks.common import Target

DATA = common.ROOT.parent / "shared" / "data" / "cifar100.npz"
CLASSES = 100


def groups_by_bytes(images: np.ndarray) -> np.ndarray:
    """The group of each image, equal for equal images, `(n,)`, by sorting images."""
    rows = images.reshape(len(images), -1)
    packed = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1])))
    return np.unique(packed.ravel(), return_inverse=True)[1]


def pairs_by_sums(images: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of identical images, found by comparing images with equal pixel sums."""
    by_sum = defaultdict(list)
    rows = images.reshape(len(images), -1)
    for index, total in enumerate(rows.sum(axis=1, dtype=np.int64).tolist()):
        by_sum[total].append(index)
    return {
        (a, b)
        for members in by_sum.values()
        for i, a in enumerate(members)
        for b in members[i + 1 :]
        if np.array_equal(rows[a], rows[b])
    }


def label_entropy(groups: np.ndarray, y: np.ndarray) -> float:
    """Mean over the samples of the entropy of the labels of their input."""
    total = 0.0
    members = defaultdict(list)
    for group, label in zip(groups.tolist(), y.tolist(), strict=True):
        members[group].append(label)
    for labels in members.values():
        for count in Counter(labels).values():
            total += count * float(np.log(len(labels) / count))
    return total / len(y)


def with_conflicts(groups: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Other labels for the last sample of every second group of identical images."""
    changed = y.copy()
    counts = np.bincount(groups)
    for group in np.flatnonzero(counts > 1)[::2]:
        last = np.flatnonzero(groups == group)[-1]
        changed[last] = (changed[last] + 1) % CLASSES
    return changed


def tiny_model(shape: tuple[int, ...]) -> keras.Model:
    """A small model. The lower bound does not depend on the model."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(shape, dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.AveragePooling2D(8),
            keras.layers.Flatten(),
            keras.layers.Dense(CLASSES),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss)
    return model


def measure(name: str, images: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Counts the repeats of some images, with labels as they are and in conflict.

    Args:
        name: Name of the set of images.
        images: Images, uint8.
        y: Labels.

    Returns:
        The counts and bounds of `certify`, and the expected ones.
    """
    groups = groups_by_bytes(images)
    found: dict[str, Any] = {
        "name": name,
        "n": len(images),
        "distinct_by_bytes": int(groups.max()) + 1,
        "pairs_by_sums": sorted(pairs_by_sums(images)),
        "labels": [],
    }
    for labels, targets in (
        ("as they are", y),
        ("some in conflict", with_conflicts(groups, y)),
    ):
        begin = time.perf_counter()
        certificate = kd.certify(tiny_model(images.shape[1:]), images, targets)
        seconds = time.perf_counter() - begin
        found["labels"].append(
            {
                "labels": labels,
                "distinct": certificate.n_distinct,
                "conflicts": certificate.n_conflicts,
                "conflicts_expected": sum(
                    len(set(targets[groups == group].tolist())) > 1
                    for group in np.flatnonzero(np.bincount(groups) > 1)
                ),
                "lower_bound": certificate.lower_bound,
                "lower_bound_expected": label_entropy(groups, targets),
                "listed": certificate.conflicts,
                "seconds": seconds,
            }
        )
    return found


def targets(measured: list[dict[str, Any]]) -> list[Target]:
    """The figures that must be shown.

    Args:
        measured: From `measure`.

    Returns:
        The targets.
    """
    cases = [(each, labels) for each in measured for labels in each["labels"]]
    return [
        Target(
            "distinct inputs: largest difference from the count by bytes",
            max(abs(c["distinct"] - m["distinct_by_bytes"]) for m, c in cases),
            0,
        ),
        Target(
            "training images that repeat an earlier one",
            measured[0]["n"] - measured[0]["labels"][0]["distinct"],
            1,
            at_least=True,
        ),
        Target(
            "conflicts: largest difference from the count by groups",
            max(abs(c["conflicts"] - c["conflicts_expected"]) for _, c in cases),
            0,
        ),
        Target(
            "lower bound: largest relative error against the closed form",
            max(
                abs(c["lower_bound"] - c["lower_bound_expected"])
                / max(c["lower_bound_expected"], 1e-300)
                for _, c in cases
            ),
            1e-12,
        ),
    ]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="file with x_train, y_train, x_test, y_test",
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, more=_options)
    with np.load(options.data) as data:
        train, test = (
            (data[f"x_{part}"], data[f"y_{part}"].astype("int64"))
            for part in ("train", "test")
        )
    both = tuple(np.concatenate(parts) for parts in zip(train, test, strict=True))
    common.warm_up()
    measured = [
        measure("training", *train),
        measure("training and test", both[0], both[1]),
    ]
    rows = [
        [
            each["name"],
            case["labels"],
            f"{each['n']:,}",
            f"{each['distinct_by_bytes']:,}",
            str(len(each["pairs_by_sums"])),
            f"{case['distinct']:,}",
            str(case["conflicts"]),
            f"{case['lower_bound']:.6e}",
            f"{case['lower_bound_expected']:.6e}",
            f"{case['seconds']:.1f}",
        ]
        for each in measured
        for case in each["labels"]
    ]
    header = [
        "images",
        "labels",
        "n",
        "distinct by bytes",
        "equal pairs",
        "distinct",
        "conflicts",
        "lower bound",
        "closed form",
        "seconds",
    ]
    about = (
        "CIFAR-100 (a class-balanced half of it). `distinct`, `conflicts`, `lower "
        "bound` and `seconds` are those of `certify`; the other columns have the same "
        "numbers, computed in another way."
    )
    common.write(
        options.out,
        "repeats",
        title="Repeated images",
        body=[about, common.table(header, rows)],
        targets=targets(measured),
        settings={"classes": CLASSES},
        measurements=measured,
    )


if __name__ == "__main__":
    main()
