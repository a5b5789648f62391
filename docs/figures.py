"""Draws the figures of docs/explanation, each from a run on digits.

Run `python docs/figures.py` from the root of the repository, with TensorFlow; it takes
a minute or two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import keras_dalign as kd

IMAGES = Path(__file__).resolve().parent / "images"
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "svg.hashsalt": "docs",
}


def digits(n: int, *, wrong: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Digits `(n, 64)` and labels `(n,)`, a share of them drawn at random."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))[:n]
    y = labels[order].astype("int32")
    drawn = rng.random(n) < wrong
    y[drawn] = rng.integers(0, 10, int(drawn.sum()))
    return (images[order] / 16).astype("float32"), y


def network(*widths: int, rate: float = 1e-3, seed: int = 0) -> keras.Model:
    """A compiled ReLU network with these hidden layers."""
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(width, activation="relu") for width in widths]
    layers = [keras.Input((64,)), *hidden, keras.layers.Dense(10)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(rate), LOSS)
    return model


def two_phases(figure: Figure, size: float) -> None:
    """Loss and gap over one `fit`."""
    x, y = digits(round(1200 * size))
    model = kd.align(network(64, 64), n_samples=len(x))
    options = {"l2": 1e-3}
    model.compile(kd.DAlign(keras.optimizers.Adam(), solve_options=options), LOSS)
    log = model.fit(x, y, epochs=max(round(20 * size), 2), verbose=0).history
    explored = log["phase"].count(0)
    epochs = np.arange(1, len(log["loss"]) + 1)
    (axes,) = axes_of(figure, 1)
    axes.semilogy(epochs[:explored], log["loss"][:explored], label="loss, exploring")
    axes.semilogy(
        epochs[explored:], log["objective"][explored:], label="loss with its L2 term"
    )
    axes.semilogy(
        epochs[explored:], log["gap"][explored:], label="gap: at most so far to go"
    )
    axes.axvline(explored + 0.5, color="black", linestyle=":")
    axes.set(xlabel="epochs, then iterations of the solver", ylabel="training loss")
    axes.legend()


def convex(figure: Figure, size: float) -> None:
    """The loss along a line between two settings of all weights, and of the head's."""
    x, y = digits(round(600 * size))
    first, second = network(64, seed=0), network(64, seed=1)
    for model in (first, second):
        model.fit(x, y, epochs=max(round(30 * size), 1), verbose=0)
    ends = first.get_weights(), second.get_weights()
    line = np.linspace(0.0, 1.0, 25)
    whole = network(64)

    def of_network(t: float) -> float:
        whole.set_weights(
            [(1 - t) * a + t * b for a, b in zip(*ends, strict=True)],
        )
        return float(whole.evaluate(x, y, batch_size=len(x), verbose=0))

    model = kd.align(first, n_samples=len(x))
    kd.solve(model, x, y, l2=1e-3, verbose=0)
    model.compile(loss=LOSS)
    variables = model.trainable_variables
    start = [keras.ops.convert_to_numpy(each) for each in variables]
    rng = np.random.default_rng(0)
    moves = [rng.standard_normal(each.shape) * np.std(each) for each in start]

    def of_head(t: float) -> float:
        for variable, value, move in zip(variables, start, moves, strict=True):
            variable.assign(value + (2 * t - 1) * 2 * move)
        return float(model.evaluate(x, y, batch_size=len(x), verbose=0))

    left, right = axes_of(figure, 2)
    left.plot(line, [of_network(t) for t in line])
    left.set(title="all weights of the network", xlabel="from one training to another")
    right.plot(line, [of_head(t) for t in line], color="C1")
    right.set(title="the head's q and b", xlabel="from one setting to another")
    left.set(ylabel="training loss")


def certificate(figure: Figure, size: float) -> None:
    """Loss, lower bound and gap, with conflicting labels."""
    x, y = digits(round(1000 * size))
    copied = round(0.05 * len(x))
    x[:copied], y[:copied] = x[-copied:], (y[-copied:] + 1) % 10
    model = network(64, rate=1e-2)
    epochs = [*range(1, max(round(40 * size), 2) + 1)]
    found = []
    for _ in epochs:
        model.fit(x, y, epochs=1, verbose=0)
        found.append(kd.certify(model, x, y))
    (axes,) = axes_of(figure, 1)
    losses = [each.loss for each in found]
    bound = found[0].lower_bound
    axes.plot(epochs, losses, label="training loss, in inference mode")
    axes.axhline(bound, color="black", linestyle=":", label="no function goes below")
    axes.fill_between(epochs, bound, losses, alpha=0.15, label="gap")
    axes.set(xlabel="epochs", ylabel="training loss", ylim=(0, max(losses)))
    axes.legend()


def l2(figure: Figure, size: float) -> None:
    """Held-out and test loss against the L2 weight, with wrong labels."""
    n = round(1000 * size)
    x, y = digits(n, wrong=0.1)
    clean_x, clean_y = digits(1797)
    base = network(64, 64)
    base.fit(x, y, epochs=max(round(15 * size), 1), verbose=0)
    chosen = kd.solve(kd.align(base, n, copy=True), x, y, loss=LOSS, verbose=0)
    weights = [10.0**-k for k in range(6)]
    test = []
    for weight in weights:
        model = kd.align(base, n, copy=True)
        kd.solve(model, x, y, loss=LOSS, l2=weight, verbose=0)
        model.compile(loss=LOSS)
        test.append(model.evaluate(clean_x[n:], clean_y[n:], verbose=0))
    (axes,) = axes_of(figure, 1)
    path = chosen.path or ()
    axes.loglog(weights, test, "o-", label="test loss")
    axes.loglog(
        [trial.l2 for trial in path],
        [trial.held_out_loss for trial in path],
        "s--",
        label="loss of training samples held out",
    )
    axes.axvline(chosen.l2, color="black", linestyle=":", label="chosen")
    axes.invert_xaxis()
    axes.set(xlabel="L2 weight, strong to weak", ylabel="loss")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.set_ylim(top=1.8 * axes.get_ylim()[1])
    axes.legend(loc="upper right")


def alignment(figure: Figure, size: float) -> None:
    """The residual of alignment against width."""
    n = round(60 * size)
    (axes,) = axes_of(figure, 1)
    widths = [1, 2, 4, 6, 8, 12, 16]
    for name, wrong in {"true labels": 0.0, "random labels": 1.0}.items():
        x, y = digits(n, wrong=wrong)
        found = [
            kd.check_alignment(network(width), x, y, parameters="all").residual
            for width in widths
        ]
        axes.plot(widths, found, "o-", label=name)
    # 64 inputs, a bias and 10 outputs for each unit, and 10 biases.
    axes.axvline((10 * n - 10) / 75, color="black", linestyle=":")
    axes.set(xlabel="width", ylabel="share of the labels out of reach", ylim=(-0.02, 1))
    axes.legend()


FIGURES: dict[str, Callable[[Figure, float], None]] = {
    "two-phases": two_phases,
    "convex": convex,
    "certificate": certificate,
    "l2": l2,
    "alignment": alignment,
}


def axes_of(figure: Figure, n: int) -> list[Any]:
    """The panels of a figure, side by side."""
    return list(np.atleast_1d(figure.subplots(1, n)))


def main(folder: Path = IMAGES, *names: str, size: float = 1.0) -> list[Path]:
    """Draws the figures.

    Args:
        folder: Where they go.
        *names: Which; all by default.
        size: The number of samples and epochs, relative to those of the pages.

    Returns:
        The paths.
    """
    paths = []
    with mpl.rc_context(STYLE):
        for name in names or FIGURES:
            figure = Figure(figsize=(6.4, 3.0), layout="constrained")
            FIGURES[name](figure, size)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


if __name__ == "__main__":
    for path in main(IMAGES, *sys.argv[1:]):
        print(path)
