"""Parametrisations of the width: movement and linear independence of features.

Under the maximal update parametrisation (muP), features of a wide network trained by
SGD move by the same amount at every width, and stay linearly independent. A
stationary point of training is then a global minimum (Z. Chen, G. Yang, Q. Zhao, Q. Gu,
ICML 2025).
Under the standard and the NTK parametrisation they stay independent, but do not move in
the limit. Under the mean-field one they move, but collapse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

import keras_dalign as kd
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.parametrizations import network
from pipelines.studies.sample import DIGITS, Row, by_seed, pooled_digits, slope
from pipelines.studies.settings import check, count, counts, number

TITLE = "Which parametrisation moves features, and keeps them independent"
PANELS = 4

KINDS = {
    "mup": "muP",
    "ntk": "NTK",
    "standard": "standard, rate / width",
    "mean_field": "mean field",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Networks of several widths under one optimizer.

    Attributes:
        words: What it is called.
        optimizer: `"sgd"` or `"adam"`.
        kinds: The parametrisations.
        factors: Units of each hidden layer, as a multiple of the width.
        widths: Key of the widths in the settings.
        steps: Key of the number of steps.
        check: Whether it is a coordinate check: layers have biases, and what is looked
            at is the change of features alone.
    """

    words: str
    optimizer: str
    kinds: tuple[str, ...]
    factors: tuple[float, ...]
    widths: str
    steps: str
    check: bool = False


_THREE = (1.0,) * 3
# Fan-in and fan-out of the hidden layers grow by different factors.
_UNEVEN = (1.0, 0.25, 1.0)
_TWO_KINDS = ("mup", "ntk")
RUNS = {
    "sgd": Run("SGD, 3 layers", "sgd", tuple(KINDS), _THREE, "widths", "steps"),
    "deep": Run(
        "SGD, 5 layers",
        "sgd",
        (*_TWO_KINDS, "mean_field"),
        (1.0,) * 5,
        "deep_widths",
        "steps",
    ),
    "adam": Run(
        "Adam, 3 layers", "adam", tuple(KINDS), _THREE, "adam_widths", "adam_steps"
    ),
    **{
        f"uneven_{optimizer}": Run(
            f"{words}, uneven layers with biases",
            optimizer,
            _TWO_KINDS,
            _UNEVEN,
            "uneven_widths",
            "uneven_steps",
            check=True,
        )
        for optimizer, words in (("sgd", "SGD"), ("adam", "Adam"))
    },
}

_RATES = {"sgd": "learning_rate", "adam": "adam_learning_rate"}
_SETTINGS = {
    "n": count(2, DIGITS),
    "base": count(1, 10**5),
    "widths": counts(1, 10**5),
    "deep_widths": counts(1, 10**5),
    "adam_widths": counts(1, 10**5),
    "uneven_widths": counts(4, 10**5),
    "steps": count(1, 10**6),
    "adam_steps": count(1, 10**6),
    "uneven_steps": count(1, 10**6),
    "learning_rate": number(1e-12, 1e3),
    "adam_learning_rate": number(1e-12, 1e3),
    "seeds": count(1, 10**3),
}


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A network for each run, kind, width and seed.

    Args:
        settings: `n`, `base` (its width), `widths` (and those of the other runs:
            `deep_widths`, `adam_widths`, `uneven_widths`), `steps`, `adam_steps`,
            `uneven_steps`, `learning_rate` (of SGD) and `adam_learning_rate`, `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If a setting has a wrong name, or is out of its range, or a run has
            a single width.
    """
    check("parametrizations", settings, _SETTINGS)
    for key in {run.widths for run in RUNS.values()}:
        widths = settings[key]
        if len(set(widths)) < 2 or len(set(widths)) < len(widths):
            raise ValueError(
                f"A slope takes two or more different widths. Received: {key}={widths}"
            )
    return [
        {"run": name, "kind": kind, "width": width, "seed": seed}
        for name, run in RUNS.items()
        for kind in run.kinds
        for width in settings[run.widths]
        for seed in range(settings["seeds"])
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Trains a network and measures its features.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        A row for each hidden layer: its `change`, the norm of the features' movement
        over that of the initial features; `lambda_min` after training, the smallest
        eigenvalue of their Gram matrix over the number of units, and
        `initial_lambda_min`; and of the whole network the `loss`, half the squared
        error of a sample, and (in no coordinate check) its gradient `bound`.
    """
    run, kind = RUNS[cell["run"]], cell["kind"]
    x, labels = pooled_digits(settings["n"], cell["seed"])
    x = 4.0 * x
    y = np.eye(network.OUTPUTS)[labels] - 0.1
    model = network.parametrized(
        kind,
        run.optimizer,
        cell["width"],
        settings["base"],
        run.factors,
        use_bias=run.check,
        seed=cell["seed"],
    )
    rate = settings[_RATES[run.optimizer]]
    if kind == "standard":
        # As it is, it would diverge.
        rate *= settings["base"] / cell["width"]
    before = network.features(model, x)
    network.train(
        model,
        x,
        y,
        optimizer=run.optimizer,
        learning_rate=rate,
        steps=settings[run.steps],
    )
    after = network.features(model, x)
    certificate = kd.certify(model, x, y, loss="mse", gradient_bound=not run.check)
    half = y.shape[1] / 2
    whole = {"loss": half * certificate.loss}
    if certificate.gradient_bound is not None:
        whole["bound"] = half * certificate.gradient_bound.gap
    return [
        {
            **cell,
            "layer": layer,
            "change": float(np.linalg.norm(z - z0) / np.linalg.norm(z0)),
            "lambda_min": network.smallest_eigenvalue(z),
            "initial_lambda_min": network.smallest_eigenvalue(z0),
            **whole,
        }
        for layer, (z0, z) in enumerate(zip(before, after, strict=True), start=1)
    ]


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """How features, Gram matrices and losses go with the width."""
    found = []
    for name, run in RUNS.items():
        found += [
            Claim(
                f"{name}_mup_change",
                f"{run.words}, muP: the change of every layer has a slope between -0.2 "
                "and 0.1 in the width (the layer furthest from -0.05)",
                _slopes(rows, name, "mup", "change", _furthest),
                low=-0.2,
                high=0.1,
            ),
            Claim(
                f"{name}_ntk_change",
                f"{run.words}, NTK: it falls in every layer, with a slope below -0.3",
                _slopes(rows, name, "ntk", "change", max),
                high=-0.3,
            ),
        ]
        if run.check:
            continue
        deepest = len(run.factors)
        found += [
            Claim(
                f"{name}_mup_lambda",
                f"{run.words}, muP: the smallest eigenvalue falls in no layer (least "
                "slope above 0)",
                _slopes(rows, name, "mup", "lambda_min", min),
                low=0.0,
            ),
            Claim(
                f"{name}_mean_field_lambda",
                f"{run.words}, mean field: it falls in the last layer (slope below 0)",
                _slopes(rows, name, "mean_field", "lambda_min", _last, [deepest]),
                high=0.0,
            ),
            Claim(
                f"{name}_mup_loss",
                f"{run.words}, muP: the loss does not grow (slope below 0)",
                _slopes(rows, name, "mup", "loss", _last, [deepest]),
                high=0.0,
            ),
            Claim(
                f"{name}_mup_bound",
                f"{run.words}, muP: the gradient bound is at most 10 times the loss at "
                "every width (largest ratio)",
                _bound_ratios(rows, name),
                low=1.0,
                high=10.0,
            ),
        ]
    widest = max(settings["deep_widths"])
    losses = [
        by_seed(
            [row for row in rows if (row["run"], row["kind"]) == ("deep", kind)],
            "loss",
            _last,
            lambda row: row["width"] == widest,
        )
        for kind in ("mean_field", "mup")
    ]
    found.append(
        Claim(
            "deep_losses",
            f"SGD, 5 layers, width {widest}: the loss of mean field is over 10 times "
            "muP's",
            [slow / fast for slow, fast in zip(*losses, strict=True)],
            low=10.0,
        )
    )
    return found


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _furthest(slopes: Sequence[float]) -> float:
    return max(slopes, key=lambda value: abs(value + 0.05))


def _slopes(
    rows: Sequence[Row],
    run: str,
    kind: str,
    key: str,
    reduce: Callable[[Sequence[float]], float],
    layers: Sequence[int] | None = None,
) -> list[float]:
    """For each seed, one of the layers' slopes in the width."""
    chosen = [row for row in rows if (row["run"], row["kind"]) == (run, kind)]
    layers = layers or sorted({row["layer"] for row in chosen})
    found = []
    for seed in sorted({row["seed"] for row in chosen}):
        slopes = []
        for layer in layers:
            places = {
                row["width"]: max(row[key], np.finfo("float64").tiny)
                for row in chosen
                if (row["seed"], row["layer"]) == (seed, layer)
            }
            slopes.append(slope(list(places), list(places.values())))
        found.append(float(reduce(slopes)))
    return found


def _bound_ratios(rows: Sequence[Row], run: str) -> list[float]:
    ratios = [
        {**row, "ratio": row["bound"] / row["loss"]}
        for row in rows
        if (row["run"], row["kind"]) == (run, "mup")
    ]
    return by_seed(ratios, "ratio", max, lambda _row: True)


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Change, smallest eigenvalue and loss against width, and a coordinate check."""
    deepest = {
        name: max((row["layer"] for row in rows if row["run"] == name), default=0)
        for name in RUNS
    }
    ends = [row for row in rows if row["layer"] == deepest[row["run"]]]
    trained = [row for row in ends if row["run"] in {"sgd", "deep"}]
    for panel, key, title in (
        (axes[0], "change", "Change of the last hidden layer, SGD"),
        (axes[1], "lambda_min", "Smallest eigenvalue of its Gram matrix"),
    ):
        mean_curves(
            panel,
            trained,
            x="width",
            y=key,
            by=("kind", "run"),
            name=lambda kind, run: f"{KINDS[kind]}, {len(RUNS[run].factors)} layers",
            dashed=lambda _kind, run: run == "deep",
        )
        panel.set_title(title)
    _slope_line(axes[0], trained, "change", -0.5)
    axes[0].set_ylabel("movement of the features / initial features")
    axes[1].set_ylabel("smallest eigenvalue / units")
    of_two = [
        {**row, "what": what, "value": row[what]}
        for row in ends
        if row["run"] == "sgd"
        for what in ("loss", "bound")
    ]
    mean_curves(
        axes[2],
        of_two,
        x="width",
        y="value",
        by=("kind", "what"),
        name=lambda kind, what: f"{KINDS[kind]}, {what}",
        dashed=lambda _kind, what: what == "bound",
    )
    axes[2].set_title("Loss, and its gradient bound (dashed), 3 layers")
    axes[2].set_ylabel("half the squared error of a sample")
    checked = [row for row in rows if RUNS[row["run"]].check]
    # One line a layer: a colour for each kind, dashed for Adam.
    for layer in sorted({row["layer"] for row in checked}):
        mean_curves(
            axes[3],
            [row for row in checked if row["layer"] == layer],
            x="width",
            y="change",
            by=("kind", "run"),
            name=lambda kind, run: f"{KINDS[kind]}, {run}",
            dashed=lambda _kind, run: run == "uneven_adam",
        )
    axes[3].set_title("Coordinate check: every layer, Adam dashed")
    axes[3].set_ylabel("movement of the features / initial features")
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("width")


def _slope_line(panel: Axes, rows: Sequence[Row], key: str, power: float) -> None:
    """A dotted line of a slope, through the geometric middle of the kernel limit."""
    chosen = [row for row in rows if row["kind"] == "ntk" and row[key] > 0]
    if not chosen:
        return
    widths = np.array(sorted({row["width"] for row in chosen}), "float64")
    middle = np.exp(
        np.mean([np.log(row[key]) - power * np.log(row["width"]) for row in chosen])
    )
    panel.plot(
        widths,
        middle * widths**power,
        ":",
        color="black",
        linewidth=1.0,
        label="slope -1/2",
    )
