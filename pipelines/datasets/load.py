"""Loads a data set by name: checked and split arrays, and their description."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.datasets import digits, imported, sampling
from pipelines.datasets.check import check
from pipelines.datasets.known import KNOWN, WHOLE, Known
from pipelines.datasets.pixels import Pixels
from pipelines.datasets.verify import Trust, verify
from pipelines.params import pick

if TYPE_CHECKING:
    from pipelines.datasets.samples import Samples
    from pipelines.params import DataParams


def load(
    name: str,
    params: DataParams,
    folder: Path,
    *,
    import_from: Path | None = None,
    allow_unverified: bool = False,
) -> tuple[Pixels, dict[str, Any]]:
    """Loads, verifies, splits and checks a data set.

    Data without an official split are split at random, stratified by class; from the
    others, fewer samples than there are are drawn in the same way. Both are seeded,
    and do not depend on the order of the copy at hand.

    Args:
        name: Its name, one of `KNOWN`.
        params: The sizes and the seed.
        folder: Where tensorflow-datasets stores its data sets.
        import_from: A folder of files to take instead of a download.
        allow_unverified: Whether unknown content is accepted as unverified.

    Returns:
        The data and their description.
    """
    known = pick("data set", KNOWN, name)
    raw, origin = _raw(name, known, folder, import_from)
    trust = verify(
        name,
        raw,
        known,
        downloaded=origin.pop("downloaded"),
        synthetic=origin["synthetic"],
        allow_unverified=allow_unverified,
    )
    if WHOLE in raw:
        train, test = sampling.split(
            raw[WHOLE], params.n_train, params.n_test, params.split_seed
        )
    else:
        train = sampling.draw(raw["train"], params.n_train, params.split_seed)
        test = sampling.draw(raw["test"], params.n_test, params.split_seed)
    data = Pixels(train, test, known.pixel_scale, synthetic=origin["synthetic"])
    check(data, params)
    return data, describe(data, known, trust, origin, params.note)


def describe(
    data: Pixels,
    known: Known,
    trust: Trust,
    origin: Mapping[str, Any],
    note: str = "",
) -> dict[str, Any]:
    """What is to be known of prepared data.

    Args:
        data: The data.
        known: The complete data set.
        trust: Why they are taken for what they are called.
        origin: Where they are from: `source` and `versions`.
        note: What is added to the title.

    Returns:
        The description, ready for JSON.
    """
    n_train, n_test = len(data.train), len(data.test)
    full_train, full_test = known.usual_split or (
        known.size("train"),
        known.size("test"),
    )
    if known.usual_split:
        # Another split of everything is not a part of it.
        partial = n_train + n_test < full_train + full_test
    else:
        partial = (n_train, n_test) != (full_train, full_test)
    return {
        "source": f"{origin['source']} ({trust.value})",
        "trust": trust.name.lower(),
        "title": ", ".join(filter(None, [_title(known, n_train, n_test, trust), note])),
        "n_train": n_train,
        "n_test": n_test,
        "full_train": full_train,
        "full_test": full_test,
        "partial": partial,
        "synthetic": data.synthetic,
        "shape": list(known.shape),
        "n_classes": data.n_classes,
        "train_classes": data.train.classes,
        "test_classes": data.test.classes,
        "pixel_scale": data.pixel_scale,
        "sha256": data.fingerprint(),
        "versions": {**origin["versions"], "numpy": version("numpy")},
    }


def _title(known: Known, n_train: int, n_test: int, trust: Trust) -> str:
    """How tables must call the data; the full name alone is for complete ones."""
    notes = []
    if known.usual_split:
        if n_train + n_test < known.size(WHOLE):
            notes.append(f"{n_train + n_test:,} of {known.size(WHOLE):,}")
    elif n_train < known.size("train"):
        notes.append(f"{n_train:,} of {known.size('train'):,}")
    elif n_test < known.size("test"):
        notes.append(f"tested on {n_test:,} of {known.size('test'):,}")
    if trust in {Trust.UNVERIFIED, Trust.SYNTHETIC}:
        notes.append(trust.value)
    return f"{known.title} ({', '.join(notes)})" if notes else known.title


def _raw(
    name: str, known: Known, folder: Path, import_from: Path | None
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """All samples that the source has, and where they are from."""
    if name == "digits":
        return {WHOLE: digits.raw()}, {
            "source": digits.SOURCE,
            "versions": digits.versions(),
            "synthetic": False,
            "downloaded": False,
        }
    path = None if import_from is None else imported.file(import_from, name)
    if path is not None:
        # Reading costs little, next to what comes; a bad file is refused before it.
        imported.read(path, known)
    # It imports TensorFlow, which nothing else here needs.
    from pipelines.datasets import builders  # noqa: PLC0415

    if path is None:
        raw, source = builders.download(name, known, folder)
    else:
        raw, source = builders.from_folder(name, known, folder, path)
    return raw, {
        "source": source,
        "versions": builders.versions(),
        "synthetic": path is not None and imported.is_synthetic(path),
        "downloaded": path is None,
    }
