"""Draws of all that is random: target, representation, and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.studies.representations import heads, representation
from pipelines.studies.representations.heads import KERNEL, LINEAR, NEURAL, UNGATED
from pipelines.studies.representations.target import PURE, sphere, values

if TYPE_CHECKING:
    from pipelines.studies.sample import Row


class Draw:
    """A target, a representation, and inputs to learn, to choose and to test by."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        d: int,
        seed: int,
        target: str = PURE,
        units: str = representation.SOFTPLUS,
    ) -> None:
        self.settings, self.d, self.seed = settings, d, seed
        self._target = target
        rng = np.random.default_rng([seed, d])
        self._beta = rng.standard_normal(d)
        self._beta /= np.linalg.norm(self._beta)
        D = representation.width(d, settings["ratio"])
        layer = representation.units(rng, d, D, units)
        self._white = representation.white(rng, d, layer, D)
        self._validation = sphere(rng, settings["validation"], d)
        self._test = sphere(rng, settings["test"], d)
        self._rng = rng.spawn(1)[0]
        self._train = np.empty((0, d))

    def _y(self, x: np.ndarray) -> np.ndarray:
        return values(x @ self._beta, self.d, self._target)

    def inputs(self, x: np.ndarray, name: str) -> np.ndarray:
        """What a head sees: the inputs with a 1 appended, or the representation."""
        if name == NEURAL:
            return self._white(x)
        return np.concatenate([x, np.ones((len(x), 1))], axis=1)

    def sample(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs `(n, d)` and targets `(n,)`, the first of them alike for any `n`."""
        if n > len(self._train):
            more = sphere(self._rng, n - len(self._train), self.d)
            self._train = np.concatenate([self._train, more])
        x = self._train[:n]
        return x, self._y(x)

    def errors(self, head: str, name: str, n: int) -> Row:
        """Trains a head on `n` samples for each weight; the best one's test error."""
        x, y = self.sample(n)
        fit, weights = self._fit(head, name)
        others = np.concatenate([self._validation, self._test])
        found = fit(self.inputs(x, name), y, weights, self.inputs(others, name))
        squares = np.square(found - self._y(others)[:, None])
        split = len(self._validation)
        # Relative to the variance on the same inputs: the target has heavy tails.
        chosen_by = squares[:split].mean(axis=0) / self._y(self._validation).var()
        errors = squares[split:].mean(axis=0) / self._y(self._test).var()
        best = int(chosen_by.argmin())
        return {
            "weight": weights[best],
            "validation": float(chosen_by[best]),
            "error": float(errors[best]),
        }

    def _fit(
        self, head: str, name: str
    ) -> tuple[Callable[..., np.ndarray], Sequence[float]]:
        settings = self.settings
        if head in {LINEAR, KERNEL}:
            regression = heads.linear if head == LINEAR else heads.kernel
            return regression, settings["ridges"]
        gates = "one" if head == UNGATED else "step" if name == NEURAL else "relu"

        def fit(*given: Any) -> np.ndarray:
            return heads.quadratic(
                *given,
                units=settings["units"]["ungated" if head == UNGATED else name],
                second_derivative=gates,
                iterations=settings["iterations"],
                seed=self.seed,
            )

        return fit, settings["penalties"][name]

    def beyond(self) -> float:
        """The part of `(beta . x)^2` that no linear function of the layer gives."""
        h, z = self._white(self._test), self._test @ self._beta
        target = z**2 - 1.0
        design = np.concatenate([h, np.ones((len(h), 1))], axis=1)
        fitted = design @ np.linalg.lstsq(design, target, rcond=None)[0]
        # Unbiased, as if the fit were tested on inputs of its own.
        freedom = len(h) - design.shape[1]
        return float(np.square(target - fitted).sum() / freedom / target.var())
