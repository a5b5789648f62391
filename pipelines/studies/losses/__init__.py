"""Neural collapse of four losses, against rank.

Trained with weight decay, features and output layer of a classifier converge to a
simplex, for cross-entropy, squared error, focal loss and label smoothing (Zhou et al.,
NeurIPS 2022). All features of a class then equal its mean, so that centred features
have rank K - 1. The alignment head needs features that still separate all samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
from matplotlib.axes import Axes

import keras_dalign as kd
from pipelines.studies import sample
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.losses import network
from pipelines.studies.losses.geometry import Geometry
from pipelines.studies.sample import DIGITS, Row, by_seed, effective_rank
from pipelines.studies.settings import check, count, counts, number

TITLE = "Neural collapse of all losses, and rank"
PANELS = 3

STRONG = "batch norm, weight decay {strong_decay:g}"
WEAK = "batch norm, weight decay {weak_decay:g}"
PLAIN = "no batch norm, weight decay {strong_decay:g}"

_SETTINGS = {
    "n": count(20, DIGITS),
    "test": count(1, DIGITS),
    "width": count(1, 10**4),
    "depth": count(1, 100),
    "plain_depth": count(1, 100),
    "strong_decay": number(0, 10),
    "weak_decay": number(0, 10),
    "epochs": count(1, 10**6),
    "batch_size": count(1, DIGITS),
    "rate": number(1e-12, 1e3),
    "squared_rate": number(1e-12, 1e3),
    "moments": count(1, 10**4),
    "switches": counts(1, 10**6),
    "tol": number(1e-15, 1.0),
    "seeds": count(1, 10**3),
}

# NC1 and NC3 that are expected at the end of 300 epochs, with strong decay: fixed
# before the study was run.
_NC1 = {
    network.CROSS_ENTROPY: 7e-3,
    network.SQUARED: 1e-4,
    network.FOCAL: 9e-3,
    network.SMOOTHING: 1e-3,
}
_NC3 = {
    network.CROSS_ENTROPY: 0.12,
    network.SQUARED: 0.02,
    network.FOCAL: 0.21,
    network.SMOOTHING: 0.05,
}
# Above this NC1 of a network without batch norm stayed, and the rank with weak decay.
_SPREAD, _MORE_RANK = 0.04, 9.5


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """A training run for each seed, kind of network and loss.

    Args:
        settings: `n` and `test` (numbers of images), `width`, `depth` (of networks with
            batch norm) and `plain_depth` (without), `strong_decay` and `weak_decay` (of
            the weights), `epochs`, `batch_size`, `rate` and `squared_rate` (learning
            rate for squared error), `moments` (how many are looked at), `switches`
            (epochs after which the head is solved), `tol` (of the solver), `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If a setting has a wrong name, or is out of its range.
    """
    check("losses", settings, _SETTINGS)
    if settings["batch_size"] > settings["n"]:
        raise ValueError(
            "An epoch needs a full batch. Received: "
            f"batch_size={settings['batch_size']}, n={settings['n']}"
        )
    if settings["n"] + settings["test"] > DIGITS:
        raise ValueError(
            f"There are {DIGITS} digits. Received: n={settings['n']}, "
            f"test={settings['test']}"
        )
    if not 0 < settings["switches"][0] < settings["switches"][-1] <= settings["epochs"]:
        raise ValueError(
            "`switches` are two epochs or more, rising, of the training. Received: "
            f"switches={settings['switches']}, epochs={settings['epochs']}"
        )
    return [
        {"loss": loss, "network": kind.format(**settings), "seed": seed}
        for seed in range(settings["seeds"])
        for kind in (STRONG, WEAK, PLAIN)
        for loss in network.LOSSES
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Geometry and rank of the features by epoch, and the head at late switches.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        For each moment a row with `nc1`, `nc2`, `nc3` and `effective_rank` of the
        training images, in inference mode, and the errors `train_error` and
        `test_error`. For each switch, of networks with batch norm and strong decay, a
        row with the head's `rank`, `sigma_min`, `sigma_max` and what `solve` reached
        there: `gap`, `iterations` and `reason`.
    """
    n, seed, loss = settings["n"], cell["seed"], cell["loss"]
    images, labels = sample.digits(n + settings["test"], seed=seed)
    x, y = images[:n], network.targets(loss, labels[:n])
    plain = cell["network"] == PLAIN.format(**settings)
    weak = cell["network"] == WEAK.format(**settings)
    model = network.classifier(
        settings["width"],
        settings["plain_depth" if plain else "depth"],
        batch_norm=not plain,
        weight_decay=settings["weak_decay" if weak else "strong_decay"],
        seed=seed,
    )
    network.compile_model(
        model,
        loss,
        rate=settings["squared_rate" if loss == network.SQUARED else "rate"],
        steps=settings["epochs"] * (n // settings["batch_size"]),
    )
    features = keras.Model(model.inputs[0], model.layers[-1].input)
    spaced = np.geomspace(1, settings["epochs"], settings["moments"] + 1)[1:]
    moments = {settings["epochs"], *(round(each) for each in spaced)}
    switches = set() if plain or weak else set(settings["switches"])
    rng, rows, done = np.random.default_rng(seed), [], 0
    for epoch in sorted(moments | switches):
        network.train(
            model,
            x,
            y,
            epochs=epoch - done,
            batch_size=settings["batch_size"],
            rng=rng,
        )
        done = epoch
        if epoch in moments:
            h = features.predict_on_batch(x)
            kernel = model.layers[-1].get_weights()[0]
            wrong = np.argmax(model.predict_on_batch(images), axis=1) != labels
            rows.append(
                {
                    **cell,
                    "epoch": epoch,
                    **asdict(Geometry.of(h, labels[:n], kernel)),
                    "effective_rank": effective_rank(h),
                    "train_error": float(wrong[:n].mean()),
                    "test_error": float(wrong[n:].mean()),
                }
            )
        if epoch in switches:
            head = _head(model, loss, x, y, settings["tol"], seed)
            rows.append({**cell, "switch": epoch, **head})
    return rows


def _head(
    model: keras.Model, loss: str, x: np.ndarray, y: np.ndarray, tol: float, seed: int
) -> Row:
    """The alignment head of a trained model, at the minimum without L2 term."""
    aligned = kd.align(model, n_samples=len(x), seed=seed, copy=True)
    # The focal loss is not convex in the logits: its head takes cross-entropy.
    convex = network.CROSS_ENTROPY if loss == network.FOCAL else loss
    with warnings.catch_warnings():
        # That rank is missing is among the results.
        warnings.simplefilter("ignore", UserWarning)
        solved = kd.solve(
            aligned, x, y, loss=network.loss(convex), tol=tol, l2=0, verbose=0
        )
    report = aligned.switch_report
    if report is None or report.rank is None:
        raise RuntimeError("The model did not reach its rank check.")
    return {
        "rank": report.rank.rank,
        "n": report.rank.rows_checked,
        "sigma_min": report.rank.sigma_min,
        "sigma_max": report.rank.sigma_max,
        "gap": solved.gap,
        "iterations": solved.iterations,
        "reason": solved.reason,
    }


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Collapse with strong decay, none without, and what the head makes of it."""
    strong, weak, plain = (kind.format(**settings) for kind in (STRONG, WEAK, PLAIN))
    last = settings["epochs"]
    features = [row for row in rows if "epoch" in row]

    def end(kind: str, loss: str, key: str) -> list[float]:
        return by_seed(
            features,
            key,
            max,
            lambda row: (
                (row["network"], row["loss"], row["epoch"]) == (kind, loss, last)
            ),
        )

    found = []
    for loss in network.LOSSES:
        name = loss.replace(" ", "_")
        found += [
            Claim(
                f"rank_{name}",
                f"{loss}, {strong}: the features end with an effective rank of 8.5 to "
                "9.5 (K - 1 = 9)",
                end(strong, loss, "effective_rank"),
                low=8.5,
                high=9.5,
            ),
            Claim(
                f"nc1_{name}",
                f"{loss}, {strong}: NC1 ends below {3 * _NC1[loss]:g}",
                end(strong, loss, "nc1"),
                high=3 * _NC1[loss],
            ),
            Claim(
                f"nc3_{name}",
                f"{loss}, {strong}: NC3 ends below {2 * _NC3[loss]:g}",
                end(strong, loss, "nc3"),
                high=2 * _NC3[loss],
            ),
            Claim(
                f"plain_{name}",
                f"{loss}, {plain}: no collapse, NC1 ends above {_SPREAD:g}",
                end(plain, loss, "nc1"),
                low=_SPREAD,
            ),
            Claim(
                f"weak_{name}",
                f"{loss}, {weak}: no collapse, the effective rank ends above "
                f"{_MORE_RANK:g}",
                end(weak, loss, "effective_rank"),
                low=_MORE_RANK,
            ),
        ]
    return found + _head_claims(rows, settings)


def _head_claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    heads = [
        {
            **row,
            "missing": row["n"] - row["rank"],
            "condition": _condition(row),
        }
        for row in rows
        if "switch" in row
    ]
    first, last = settings["switches"][0], settings["switches"][-1]

    def at(switch: int, loss: str, key: str) -> list[float]:
        return by_seed(
            heads,
            key,
            max,
            lambda row: (row["switch"], row["loss"]) == (switch, loss),
        )

    found = []
    for loss in network.LOSSES:
        name = loss.replace(" ", "_")
        late, early = (at(each, loss, "condition") for each in (last, first))
        found += [
            Claim(
                f"condition_{name}",
                f"{loss}: sigma_min / sigma_max of the head after {last} epochs is "
                f"below a tenth of that after {first} (ratio below 0.1)",
                [a / b for a, b in zip(late, early, strict=True)],
                high=0.1,
            ),
            Claim(
                f"missing_{name}",
                f"{loss}: after {last} epochs the head lacks rank (1 or more of "
                f"{settings['n']})",
                at(last, loss, "missing"),
                low=1,
            ),
            Claim(
                f"solved_{name}",
                f"{loss}: the solver's gap after {last} epochs is at most "
                f"{settings['tol']:g} all the same",
                at(last, loss, "gap"),
                high=settings["tol"],
            ),
        ]
    return found


def _condition(head: Row) -> float:
    """Smallest over largest singular value, resolved down to the epsilon of float64."""
    least = float(np.finfo(np.float64).eps)
    return float(max(head["sigma_min"] / head["sigma_max"], least))


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Effective rank and NC1 by epoch, and the head's conditioning at each switch."""
    features = [row for row in rows if "epoch" in row]
    heads = [{**row, "condition": _condition(row)} for row in rows if "switch" in row]
    strong = heads[0]["network"]

    def name(loss: str, kind: str) -> str:
        return loss if kind == strong else f"{loss}: {kind}"

    shown = [row for row in features if "no batch norm" not in row["network"]]
    for panel, chosen, key, noun in (
        (axes[0], shown, "effective_rank", "effective rank of the centred features"),
        (
            axes[1],
            [row for row in features if row not in shown or row["network"] == strong],
            "nc1",
            "NC1: spread within classes over spread between them",
        ),
    ):
        mean_curves(
            panel,
            chosen,
            x="epoch",
            y=key,
            by=("loss", "network"),
            name=name,
            dashed=lambda _loss, kind: kind != strong,
        )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("epoch")
        panel.set_ylabel(noun)
    axes[0].axhline(network.CLASSES - 1, color="black", linestyle=":", linewidth=1)
    axes[0].set_title("rank (dotted: K - 1; dashed: weak decay)")
    axes[1].set_title("collapse (dashed: no batch norm)")
    mean_curves(axes[2], heads, x="switch", y="condition", by=("loss",), name=str)
    axes[2].set_xscale("log")
    axes[2].set_yscale("log")
    axes[2].set_xlabel("epochs before the switch")
    axes[2].set_ylabel("sigma_min / sigma_max of the head")
    axes[2].set_title(f"the head ({strong})")
