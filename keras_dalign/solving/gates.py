"""The gates of a head: their values for rows of features."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.special

from keras_dalign.numerics import threads
from keras_dalign.numerics.gram import gate_activations

if TYPE_CHECKING:
    from keras_dalign.numerics import Array
    from keras_dalign.solving.feature_rows import FeatureRows

# A block of rows and what is computed from it fit into the CPU's caches.
_BLOCK_BYTES = 2**22
# Above this number of multiply-adds, several threads compute the values.
_THREADED = 2**21


@dataclasses.dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a head.

    Attributes:
        r: Shape `(d, G, m)`, float64. `G` is 1 if outputs share their gates, and the
            number of outputs otherwise.
        w: Output weights, shape `(G, m)`, float64.
        slope: Slope of the sigmoid.
        kept: The values times output weights, shape `(n, G, m)`, if the features of the
            problem do not suffice to compute them; None otherwise.
    """

    r: Array
    w: Array
    slope: float
    kept: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Number of gated units per output."""
        return int(self.w.shape[1])

    @property
    def groups(self) -> int:
        """Number of sets of gates, `G`: 1 if outputs share them."""
        return len(self.w)

    def of_output(self, output: int) -> tuple[Array, Array]:
        """Gates `(d, m)` and weights `(m,)` of one output."""
        group = output % self.groups
        return self.r[:, group], self.w[group]

    def values(self, v: np.ndarray) -> np.ndarray:
        """The gates' values times output weights.

        Args:
            v: Rows of `v`, shape `(rows, d)`.

        Returns:
            Shape `(rows, G, m)`, in the dtype of `v`.
        """
        r = self.r.reshape(len(self.r), -1)
        if v.dtype == np.float32:
            values = scipy.special.expit(np.float32(self.slope) * (v @ r.astype("f4")))
        else:
            values = gate_activations(v, r, self.slope)
        values = values.reshape(len(v), self.groups, self.width)
        values *= self.w.astype(v.dtype)
        return values

    def of_rows(self, rows: npt.NDArray[np.intp], v: np.ndarray) -> np.ndarray:
        """The values for some samples.

        Args:
            rows: Their indices.
            v: Their features, shape `(rows, d)`.

        Returns:
            Shape `(rows, G, m)`.
        """
        return self.values(v) if self.kept is None else self.kept[rows]

    def all_values(self, rows: FeatureRows, dtype: npt.DTypeLike) -> np.ndarray:
        """The values for all samples, shape `(n, G, m)`."""
        if self.kept is not None:
            return self.kept.astype(dtype, copy=False)
        out = np.empty((rows.n, self.groups, self.width), dtype)
        row_bytes = 8 * (rows.d + 2 * self.groups * self.width)

        def compute(part: slice) -> None:
            for block in rows.blocks(row_bytes, _BLOCK_BYTES, part):
                out[block] = self.values(rows.block(block, dtype))

        split = rows.n * self.r.size >= _THREADED
        threads.over_rows(compute, rows.n, split=split)
        return out

    def nbytes(self, n: int, dtype: npt.DTypeLike) -> int:
        """Bytes of the values for `n` samples."""
        return n * self.groups * self.width * np.dtype(dtype).itemsize
