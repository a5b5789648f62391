"""Semeion for tensorflow-datasets, which has no builder of it. Imports TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from pipelines.datasets import semeion
from pipelines.datasets.known import KNOWN, WHOLE


class Semeion(tfds.core.GeneratorBasedBuilder):
    """1,593 handwritten digits of 16 x 16 black or white pixels, without a split."""

    VERSION = tfds.core.Version("1.0.0")
    URL = semeion.URL

    def _info(self) -> Any:
        known = KNOWN["semeion"]
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=known.shape),
                    "label": tfds.features.ClassLabel(num_classes=known.n_classes),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/178",
            citation=(
                "Semeion Handwritten Digit, Semeion Research Center of Sciences of "
                "Communication and Tactile Srl, UCI Machine Learning Repository, 2008"
            ),
        )

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
        path = Path(dl_manager.download(self.URL))
        try:
            table = semeion.parse(path.read_text(encoding="ascii", errors="replace"))
            semeion.check_table(table)
        except ValueError:
            # Otherwise the next attempt would take it from the cache, or compare
            # what it downloads with the record beside it.
            path.unlink()
            path.with_name(f"{path.name}.INFO").unlink(missing_ok=True)
            raise
        return {WHOLE: self._generate_examples(table)}

    def _generate_examples(self, table: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        found = semeion.samples(table)
        for i, (image, label) in enumerate(zip(found.x, found.y, strict=True)):
            yield i, {"image": image, "label": int(label)}
