"""Autoencoders of two layers: how wide must they be, and what does tying do?

`u(x) = c A relu(W^T x)`, trained by gradient descent on half the squared error: the
encoder `W` alone, the decoder `A` alone, both jointly, or tied, `A = W`. Source: T. V.
Nguyen, R. K. W. Wong and C. Hegde, "Benefits of Jointly Training Autoencoders: An
Improved Neural Tangent Kernel Analysis", IEEE Transactions on Information Theory, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from pipelines.studies.autoencoders import measurements
from pipelines.studies.autoencoders.network import TRAINED
from pipelines.studies.claims import Claim
from pipelines.studies.curves import mean_curves
from pipelines.studies.sample import Row, by_seed, slope

TITLE = "Autoencoders of two layers"
PANELS = 4

# Key of the settings, and the least value that it may have.
_LEAST = {
    "samples": 2,
    "widths": 1,
    "steps": 1,
    "limit_samples": 2,
    "limit_widths": 1,
    "rate_samples": 2,
    "rate_width": 1,
    "stall_samples": 2,
    "stall_widths": 1,
    "stall_steps": 1,
    "stall_moments": 2,
    "tied_samples": 2,
    "tied_widths": 1,
    "tied_steps": 1,
    "unseen": 1,
    "seeds": 1,
}
_LISTS = ("samples", "widths", "limit_widths", "stall_widths", "tied_widths")

_NAMES = {
    "encoder": "encoder alone",
    "decoder": "decoder alone",
    "joint": "both, jointly",
    "tied": "tied",
}
_WITH_LIMIT = ("encoder", "decoder", "joint")


def cells(settings: Mapping[str, Any]) -> list[Row]:
    """Runs of five kinds; see `measurements` for each.

    Args:
        settings: `samples` (numbers of digits), `widths` (to search for the least),
            `steps` of gradient descent, `tolerance` (of the initial loss, that counts
            as fitted); `limit_samples`, `limit_widths`; `rate_samples`, `rate_width`;
            `stall_samples`, `stall_widths`, `stall_steps`, `stall_moments`;
            `tied_samples`, `tied_widths`, `tied_steps`, `unseen` (digits that are not
            trained on); `seeds`.

    Returns:
        The cells.

    Raises:
        ValueError: If a setting is missing, unknown or out of range.
    """
    check(settings)
    seeds = range(settings["seeds"])
    return [
        *(
            {"kind": "least", "trained": trained, "n": n, "seed": seed}
            for n in settings["samples"]
            for trained in TRAINED
            for seed in seeds
        ),
        *(
            {"kind": "limit", "trained": trained, "width": width, "seed": seed}
            for trained in _WITH_LIMIT
            for width in settings["limit_widths"]
            for seed in seeds
        ),
        *(
            {"kind": "rate", "trained": trained, "seed": seed}
            for trained in _WITH_LIMIT
            for seed in seeds
        ),
        *(
            {"kind": "stall", "width": width, "seed": seed}
            for width in settings["stall_widths"]
            for seed in seeds
        ),
        *(
            {"kind": "unseen", "trained": trained, "width": width, "seed": seed}
            for trained in ("encoder", "joint", "tied")
            for width in settings["tied_widths"]
            for seed in seeds
        ),
    ]


def measure(settings: Mapping[str, Any], cell: Row) -> list[Row]:
    """Computes one cell.

    Args:
        settings: As for `cells`.
        cell: One of them.

    Returns:
        Its rows, which repeat it.
    """
    run: Callable[..., list[Row]] = getattr(measurements, cell["kind"])
    return [{**cell, **row} for row in run(settings, cell)]


def check(settings: Mapping[str, Any]) -> None:
    """Checks the settings.

    Args:
        settings: As for `cells`.

    Raises:
        ValueError: If one is missing, unknown or out of range.
    """
    names = {*_LEAST, "tolerance"}
    if set(settings) != names:
        raise ValueError(
            f"The study 'autoencoders' takes the settings {sorted(names)}. Received: "
            f"unknown {sorted(set(settings) - names)}, missing "
            f"{sorted(names - set(settings))}"
        )
    for name, least in _LEAST.items():
        values = settings[name] if name in _LISTS else [settings[name]]
        if not isinstance(values, Sequence) or not values:
            raise ValueError(f"`{name}` must be a list. Received: {name}={values!r}")
        for value in values:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least:
                raise ValueError(
                    f"`{name}` must be at least {least}, and whole. Received: "
                    f"{name}={settings[name]!r}"
                )
    if len(set(settings["limit_widths"])) < 2:
        raise ValueError(
            "`limit_widths` must be two widths at least, for a slope. Received: "
            f"limit_widths={settings['limit_widths']}"
        )
    tolerance = settings["tolerance"]
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ValueError(
            f"`tolerance` must be between 0 and 1. Received: tolerance={tolerance!r}"
        )


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Least widths, limits, rates, the stalled run, and tied weights."""
    return [
        *_claims_of_widths(rows, settings),
        *_claims_of_limits(rows, settings),
        *_claims_of_stalls(rows, settings),
        *_claims_of_tying(rows, settings),
    ]


def _which(**keys: Any) -> Callable[[Row], bool]:
    return lambda row: all(row.get(key) == value for key, value in keys.items())


def _claims_of_widths(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    # Where no width was enough: twice the widest.
    beyond = 2 * max(settings["widths"])
    found = {
        (row["trained"], row["n"], row["seed"]): row["least"] or beyond
        for row in rows
        if row["kind"] == "least"
    }
    samples, seeds = settings["samples"], range(settings["seeds"])

    def least(trained: str, seed: int) -> list[float]:
        return [found[trained, n, seed] for n in samples]

    def ratios(trained: str) -> list[float]:
        return [
            max(
                joint / other
                for joint, other in zip(
                    least("joint", seed), least(trained, seed), strict=True
                )
            )
            for seed in seeds
        ]

    made = [
        Claim(
            f"joint_to_{trained}",
            "The least width that fits of the joint network is at most that of the "
            f"{trained} alone, at every number of samples (largest ratio)",
            ratios(trained),
            high=1.0,
        )
        for trained in ("encoder", "decoder")
    ]
    if len(set(samples)) > 1:
        made += [
            Claim(
                f"width_slope_{trained}",
                f"{statement} (slope of the least width against the number of samples, "
                f"in logarithms, from {low:g} to {high:g})",
                [slope(samples, least(trained, seed)) for seed in seeds],
                low=low,
                high=high,
            )
            for trained, statement, low, high in (
                (
                    "encoder",
                    "Encoder alone: hardly more width for more samples",
                    0,
                    0.4,
                ),
                ("joint", "Jointly: width about in proportion to samples", 0.6, 1.1),
            )
        ]
    return made


def _claims_of_limits(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    made = []
    for trained in _WITH_LIMIT:
        distances = [
            by_seed(
                rows,
                "distance",
                max,
                _which(kind="limit", trained=trained, width=width),
            )
            for width in settings["limit_widths"]
        ]
        made.append(
            Claim(
                f"limit_slope_{trained}",
                f"{_NAMES[trained].capitalize()}: the distance of the tangent kernel "
                "to its limit falls like width^-1/2 (slope from -0.6 to -0.4)",
                [
                    slope(settings["limit_widths"], each)
                    for each in zip(*distances, strict=True)
                ],
                low=-0.6,
                high=-0.4,
            )
        )
    width = settings["rate_width"]
    for trained in _WITH_LIMIT:
        which = _which(kind="rate", trained=trained)
        made.append(
            Claim(
                f"rate_{trained}",
                f"{_NAMES[trained].capitalize()}, width {width}: the rate at which the "
                "loss falls in the end is that of the limit kernel's smallest "
                "eigenvalue (ratio from 0.75 to 1.25)",
                by_seed(rows, "rate_to_limit", max, which),
                low=0.75,
                high=1.25,
            )
        )
    encoder, joint = (
        by_seed(rows, "rate", max, _which(kind="rate", trained=trained))
        for trained in ("encoder", "joint")
    )
    made.append(
        Claim(
            "rate_encoder_to_joint",
            f"Width {width}, each at its own largest learning rate: the encoder alone "
            "is faster than both jointly (ratio of the rates above 1)",
            [a / b for a, b in zip(encoder, joint, strict=True)],
            low=1.0,
        )
    )
    return made


def _claims_of_stalls(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    narrow, wide = min(settings["stall_widths"]), max(settings["stall_widths"])
    last = settings["stall_steps"]
    runs = [
        {**row, "missing": row["n_rows"] - row["rank"]}
        for row in rows
        if row["kind"] == "stall"
    ]

    def values(key: str, width: int, step: int) -> list[float]:
        return by_seed(runs, key, max, _which(width=width, step=step))

    who = f"Encoder alone, width {narrow}"
    return [
        Claim(
            "stall_birth",
            f"{who}: aligned at birth (residual at most 1e-6)",
            values("residual", narrow, 0),
            high=1e-6,
        ),
        Claim(
            "stall_missing",
            f"{who}: after {last} steps the Jacobian lacks rank (at least 1)",
            values("missing", narrow, last),
            low=1,
        ),
        Claim(
            "stall_residual",
            f"{who}: not aligned any more after {last} steps (residual at least 1e-3)",
            values("residual", narrow, last),
            low=1e-3,
        ),
        Claim(
            "stall_decoder",
            f"{who}: what is missing then is in reach of the decoder (residual of the "
            "last layer at most 1e-3, by the monitor)",
            values("last_residual", narrow, last),
            high=1e-3,
        ),
        Claim(
            "stall_wide",
            f"Encoder alone, width {wide}: still aligned after {last} steps (residual "
            "at most 1e-6)",
            values("residual", wide, last),
            high=1e-6,
        ),
    ]


def _claims_of_tying(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    wide = max(settings["tied_widths"])

    def values(key: str, trained: str) -> list[float]:
        return by_seed(
            rows, key, max, _which(kind="unseen", trained=trained, width=wide)
        )

    ratios = [
        {**row, "ratio": row["least_joint"] / row["least_tied"]}
        for row in rows
        if row["kind"] == "unseen" and row["trained"] == "tied"
    ]
    return [
        Claim(
            "tied_birth",
            f"Tied, width {wide}, c = 2 / m: the loss at birth is n (d + 1.5) / m "
            "(ratio from 0.75 to 1.25)",
            values("birth_to_formula", "tied"),
            low=0.75,
            high=1.25,
        ),
        Claim(
            "tied_birth_large",
            f"Tied, width {wide}, c = 1 / sqrt(m d): the loss at birth grows with the "
            "width as the formula says (ratio from 0.75 to 1.25)",
            values("large_birth_to_formula", "tied"),
            low=0.75,
            high=1.25,
        ),
        Claim(
            "tied_unseen_birth",
            f"Tied, width {wide}, c = 2 / m: reconstructs unseen digits before any "
            "training (squared error at most 0.02 of their norm's square)",
            values("unseen_at_birth", "tied"),
            high=0.02,
        ),
        Claim(
            "tied_unseen",
            "The same after training (at most 0.01)",
            values("unseen", "tied"),
            high=0.01,
        ),
        Claim(
            "tied_movement",
            "Its weights hardly move (by at most 0.1 of their norm)",
            values("movement", "tied"),
            high=0.1,
        ),
        Claim(
            "fitted",
            f"Encoder alone and both jointly, width {wide}: the digits trained on are "
            "reconstructed (squared error at most 1e-3, the larger of the two)",
            by_seed(
                rows,
                "loss",
                max,
                lambda row: (
                    row["kind"] == "unseen"
                    and row["trained"] != "tied"
                    and row["width"] == wide
                ),
            ),
            high=1e-3,
        ),
        *(
            Claim(
                f"unseen_{trained}",
                f"{_NAMES[trained].capitalize()}, width {wide}: unseen digits are not "
                "reconstructed (squared error at least 0.05)",
                values("unseen", trained),
                low=0.05,
            )
            for trained in ("encoder", "joint")
        ),
        Claim(
            "tied_condition",
            "Digits: the smallest eigenvalue of the tied kernel is at least 10 times "
            "below that of the joint one (least ratio over the widths)",
            by_seed(ratios, "ratio", min, lambda _row: True),
            low=10,
        ),
    ]


def draw(axes: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Least widths, the stalled run, limits, and unseen inputs."""
    widths, stall, limits, unseen = axes
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    mean_curves(
        widths,
        [row for row in kinds["least"] if row["least"]],
        x="n",
        y="least",
        by=("trained",),
        name=_NAMES.__getitem__,
    )
    widths.set_xscale("log", base=2)
    widths.set_yscale("log", base=2)
    widths.set_title("how wide is wide enough?")
    widths.set_xlabel("training samples")
    widths.set_ylabel("least width that fits")

    shown = [
        {**row, "curve": curve, "value": max(row[key], 1e-16), "place": row["step"] + 1}
        for curve, key in (("loss", "loss"), ("residual of alignment", "residual"))
        for row in kinds["stall"]
    ]
    mean_curves(
        stall,
        shown,
        x="place",
        y="value",
        by=("width", "curve"),
        name=lambda width, curve: f"width {width}, {curve}",
        dashed=lambda _width, curve: curve != "loss",
    )
    stall.set_xscale("log")
    stall.set_yscale("log")
    stall.set_title("encoder alone: aligned at birth, and later?")
    stall.set_xlabel("step of gradient descent + 1")
    stall.set_ylabel("loss over its initial value, or residual")
    stall.legend(frameon=False, fontsize="small")

    lines = mean_curves(
        limits,
        kinds["limit"],
        x="width",
        y="distance",
        by=("trained",),
        name=_NAMES.__getitem__,
    )
    for (trained,), color in lines.items():
        own = [row for row in kinds["limit"] if row["trained"] == trained]
        first = min(row["width"] for row in own)
        places = sorted({row["width"] for row in own})
        start = [row["distance"] for row in own if row["width"] == first]
        mean = math.fsum(start) / len(start)
        heights = [mean * math.sqrt(first / place) for place in places]
        limits.plot(places, heights, ":", color=color)
    limits.set_xscale("log", base=2)
    limits.set_yscale("log")
    limits.set_title("tangent kernel at birth (dotted: slope -1/2)")
    limits.set_xlabel("width")
    limits.set_ylabel("relative distance to the limit kernel")
    limits.legend(frameon=False, fontsize="small")

    errors = [
        {**row, "which": f"{_NAMES[row['trained']]}, trained", "value": row["unseen"]}
        for row in kinds["unseen"]
    ]
    errors += [
        {**row, "which": "tied, at birth", "value": row["unseen_at_birth"]}
        for row in kinds["unseen"]
        if row["trained"] == "tied"
    ]
    mean_curves(unseen, errors, x="width", y="value", by=("which",), name=str)
    unseen.set_xscale("log", base=2)
    unseen.set_yscale("log")
    unseen.set_title("reconstruction of unseen digits")
    unseen.set_xlabel("width")
    unseen.set_ylabel("squared error over the norm's square")
    unseen.legend(frameon=False, fontsize="small")
