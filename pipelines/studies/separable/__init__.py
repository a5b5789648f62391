"""The last layer in closed form while the others are trained: slimTrain.

slimTrain (Newman, Chung, Chung, Ruthotto, SIAM J. Sci. Comput. 2022) trains the last
layer by iterative sampled Tikhonov regularisation, its weight chosen for every batch by
sampled generalised cross-validation, and all other layers by Adam. Claim: it learns
faster from few data, and hardly depends on the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import DIGITS, Row, by_seed
from pipelines.studies.separable import network
from pipelines.studies.separable.slimtrain import LEAST_STRENGTH
from pipelines.studies.settings import check, count, counts, number, numbers

TITLE = "The last layer in closed form, batch by batch"
PANELS = 3

ADAM, SLIMTRAIN, TWO_PHASES = "Adam", "slimTrain", "two phases"
_FIXED = "fixed Lambda = {:g}"

_SETTINGS = {
    "sizes": counts(1, DIGITS),
    "validation": count(1, DIGITS),
    "test": count(1, DIGITS),
    "hidden": count(1, 10**4),
    "code": count(1, 10**4),
    "epochs": count(1, 10**6),
    "batch_size": count(1, DIGITS),
    "rates": numbers(1e-12, 1e3),
    "other_rates": numbers(1e-12, 1e3),
    "rate": number(1e-12, 1e3),
    "strength": number(LEAST_STRENGTH, 1e6),
    "memory": count(0, 10**4),
    "fixed": numbers(LEAST_STRENGTH, 1e6),
    "switches": counts(1, 10**6),
    "seeds": count(1, 10**3),
}

# Validation losses that are expected at the learning rate 1e-3, by number of images:
# fixed before the study was run.
_EXPECTED = {
    ADAM: {64: 0.065, 256: 0.034, 1024: 0.025},
    SLIMTRAIN: {64: 0.044, 256: 0.022, 1024: 0.018},
}
# The number of images for which all learning rates are tried.
_MIDDLE = 256
# The fixed Lambda that is expected to do as well as the chosen one.
_GOOD = 0.01


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A number of images and a method, with all its learning rates, for each seed.

    Args:
        settings: `sizes` (numbers of training images), `validation` and `test` (of
            those), `hidden` and `code` (widths of the layers), `epochs`, `batch_size`,
            `rates` (learning rates for the middle size), `other_rates` (for the other
            sizes) and the `rate` of the figure, `strength` (slimTrain starts with it)
            and `memory` (in batches), `fixed` (values of a Lambda that stays: the first
            for all sizes, the others for the middle one), `switches` (epochs after
            which the head is solved, for the figure's rate; for the others after the
            last), `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If a setting has a wrong name, or is out of its range.
    """
    check("separable", settings, _SETTINGS)
    if settings["batch_size"] > min(settings["sizes"]):
        raise ValueError(
            "An epoch needs a full batch. Received: "
            f"batch_size={settings['batch_size']}, sizes={settings['sizes']}"
        )
    total = settings["validation"] + settings["test"] + max(settings["sizes"])
    if total > DIGITS:
        raise ValueError(
            f"There are {DIGITS} digits. Received: {total} for training, "
            "validation and test"
        )
    if settings["rate"] not in {*settings["rates"]} & {*settings["other_rates"]}:
        raise ValueError(
            "The `rate` of the figure must be one of `rates` and of `other_rates`. "
            f"Received: rate={settings['rate']}, rates={settings['rates']}, "
            f"other_rates={settings['other_rates']}"
        )
    if settings["switches"][-1] != settings["epochs"]:
        raise ValueError(
            "The last of the `switches` must be the last epoch. Received: "
            f"switches={settings['switches']}, epochs={settings['epochs']}"
        )
    return [
        {"n": n, **kind, "seed": seed}
        for seed in range(settings["seeds"])
        for n in settings["sizes"]
        for kind in [
            {"method": ADAM, "strength": 0.0},
            {"method": SLIMTRAIN, "strength": settings["strength"]},
            *(
                {"method": _FIXED.format(strength), "strength": strength}
                for strength in _fixed(settings, n)
            ),
        ]
    ]


def _rates(settings: Mapping[str, Any], n: int) -> list[float]:
    """The learning rates for a number of images."""
    key = "rates" if n == _middle(settings) else "other_rates"
    return list(settings[key])


def _fixed(settings: Mapping[str, Any], n: int) -> list[float]:
    """The values of a Lambda that stays, for a number of images."""
    first, *others = settings["fixed"]
    return [first, *others] if n == _middle(settings) else [first]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Losses by epoch, at every learning rate.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        A row for each rate and some of the epochs, with the mean squared errors
        `train`, `validation` and `test`. Of Adam also those with the head solved after
        that epoch, as the method `"two phases"`.
    """
    seed, method = cell["seed"], cell["method"]
    images = network.Images.drawn(
        cell["n"], settings["validation"], settings["test"], seed
    )
    looked_at = network.moments(settings["epochs"], settings["switches"])
    rows = []
    for rate in _rates(settings, cell["n"]):
        model = network.autoencoder(settings["hidden"], settings["code"], seed)
        if method == ADAM:
            step = network.adam(model, rate)
        else:
            step = network.slimtrain(
                model,
                rate,
                strength=cell["strength"],
                chosen=method == SLIMTRAIN,
                memory=settings["memory"],
            )
        known = {**cell, "rate": rate}
        for epoch in network.epochs(
            step,
            images.train,
            count=settings["epochs"],
            batch_size=settings["batch_size"],
            seed=seed,
        ):
            if epoch in looked_at:
                rows.append({**known, "epoch": epoch, **images.losses(model)})
            switches = settings["switches"][0 if rate == settings["rate"] else -1 :]
            if method == ADAM and epoch in switches:
                losses = network.two_phases(model, images, seed)
                other = {**known, "method": TWO_PHASES}
                rows.append({**other, "epoch": epoch, **losses})
    return rows


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Speed, sensitivity to the learning rate, and what a fixed Lambda does."""
    found: list[Claim] = []
    last, shown = settings["epochs"], settings["rate"]

    def of(method: str, n: int, rate: float, epoch: int) -> list[float]:
        return by_seed(
            rows,
            "validation",
            min,
            lambda row: (
                (row["method"], row["n"], row["rate"], row["epoch"])
                == (method, n, rate, epoch)
            ),
        )

    for n in settings["sizes"]:
        found.append(
            Claim(
                f"first_epoch_{n}",
                f"{n} images, rate {shown:g}: slimTrain's validation loss after one "
                "epoch is below half of Adam's (ratio below 0.5)",
                _ratio(of(SLIMTRAIN, n, shown, 1), of(ADAM, n, shown, 1)),
                high=0.5,
            )
        )
        for method, values in _EXPECTED.items():
            if n in values:
                low, high = 0.8 * values[n], 1.2 * values[n]
                found.append(
                    Claim(
                        f"final_{method}_{n}",
                        f"{n} images, rate {shown:g}: {method}'s validation loss after "
                        f"{last} epochs is {low:.3f} to {high:.3f}",
                        of(method, n, shown, last),
                        low=low,
                        high=high,
                    )
                )
        for strength in _fixed(settings, n):
            wide = 1.1 if strength == _GOOD else 1.25
            found.append(
                Claim(
                    f"fixed_{strength:g}_{n}",
                    f"{n} images, each at its best rate: test loss with Lambda fixed "
                    f"to {strength:g} over slimTrain's is {1 / wide:.2f} to {wide:g}",
                    _ratio(
                        best(rows, _FIXED.format(strength), n, last),
                        best(rows, SLIMTRAIN, n, last),
                    ),
                    low=1 / wide,
                    high=wide,
                )
            )
        rivals = _ratio(best(rows, ADAM, n, last), best(rows, SLIMTRAIN, n, last))
        found.append(
            Claim(
                f"adam_{n}",
                f"{n} images, each at its best rate: Adam's test loss over slimTrain's "
                "is above 1",
                rivals,
                low=1.0,
            )
        )
        phases = _ratio(best(rows, TWO_PHASES, n, last), best(rows, SLIMTRAIN, n, last))
        found.append(
            Claim(
                f"two_phases_{n}",
                f"{n} images, each at its best rate: test loss of two phases over "
                "slimTrain's is below 1",
                phases,
                high=1.0,
            )
        )
    middle = _middle(settings)
    kinds = [SLIMTRAIN, *map(_FIXED.format, _fixed(settings, middle))]
    spreads = {
        method: _ratio(
            *(
                by_seed(rows, "validation", reduce, _ended(method, middle, last))
                for reduce in (max, min)
            )
        )
        for method in (ADAM, *kinds)
    }
    found += [
        Claim(
            f"spread_{kind.replace(' ', '_')}",
            f"{middle} images: worst over best validation loss of all rates is smaller "
            f"for {kind} than for Adam (ratio of the two below 1)",
            _ratio(spreads[kind], spreads[ADAM]),
            high=1.0,
        )
        for kind in kinds
    ]
    few, large = min(settings["sizes"]), 10 * shown
    if large in _rates(settings, few):
        on_the_way = by_seed(
            rows,
            "validation",
            min,
            lambda row: (
                (row["method"], row["n"], row["rate"]) == (SLIMTRAIN, few, large)
            ),
        )
        ends = of(SLIMTRAIN, few, large, last)
        found.append(
            Claim(
                "overfits",
                f"{few} images, rate {large:g}: slimTrain overfits, its validation "
                "loss at the end over its least on the way is above 1.1",
                _ratio(ends, on_the_way),
                low=1.1,
            )
        )
        found.append(
            Claim(
                "overfits_against_adam",
                f"{few} images, rate {large:g}: slimTrain's validation loss at the end "
                "is above Adam's (ratio above 1)",
                _ratio(ends, of(ADAM, few, large, last)),
                low=1.0,
            )
        )
    return found


def best(rows: Sequence[Row], method: str, n: int, epoch: int) -> list[float]:
    """Test losses at the learning rate that the validation images choose.

    Args:
        rows: The rows of the study.
        method: A method.
        n: Number of images.
        epoch: The last one.

    Returns:
        One number for each seed; the rate is chosen for each.
    """
    ended = [row for row in rows if _ended(method, n, epoch)(row)]
    return [
        float(
            min(
                (row for row in ended if row["seed"] == seed),
                key=lambda row: row["validation"],
            )["test"]
        )
        for seed in sorted({row["seed"] for row in ended})
    ]


def _ended(method: str, n: int, epoch: int) -> Any:
    return lambda row: (row["method"], row["n"], row["epoch"]) == (method, n, epoch)


def _ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _middle(settings: Mapping[str, Any]) -> int:
    sizes = sorted(settings["sizes"])
    return _MIDDLE if _MIDDLE in sizes else int(sizes[len(sizes) // 2])


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Validation loss by epoch for few and many images, and by learning rate."""
    sizes = sorted({row["n"] for row in rows})
    rates = sorted({row["rate"] for row in rows})
    last = max(row["epoch"] for row in rows)
    shown = 1e-3 if 1e-3 in rates else rates[len(rates) // 2]
    middle = _middle({"sizes": sizes})
    panels = [
        (sizes[0], "epoch", {"rate": shown}),
        (sizes[-1], "epoch", {"rate": shown}),
        (middle, "rate", {"epoch": last}),
    ]
    for panel, (n, x, fixed) in zip(axes, panels, strict=True):
        ((key, value),) = fixed.items()
        chosen = [row for row in rows if row["n"] == n and row[key] == value]
        mean_curves(panel, chosen, x=x, y="validation", by=("method",), name=str)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylabel("validation loss (mean squared error per pixel)")
        panel.set_xlabel(
            "epoch (two phases: epochs before the switch)"
            if x == "epoch"
            else "learning rate of Adam"
        )
        panel.set_title(
            f"{n} images, learning rate {value:g}"
            if x == "epoch"
            else f"{n} images, after {last} epochs"
        )
    first = axes[0].get_legend_handles_labels()[1]
    more = [line for line in axes[-1].lines if line.get_label() not in first]
    if more:
        axes[-1].legend(handles=more, frameon=False)
