"""The expectations of the study, as claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.studies.autoencoders.labels import NAMES, WITH_LIMIT
from pipelines.studies.claims import Claim
from pipelines.studies.sample import Row, by_seed, slope


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
    for trained in WITH_LIMIT:
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
                f"{NAMES[trained].capitalize()}: the distance of the tangent kernel "
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
    for trained in WITH_LIMIT:
        which = _which(kind="rate", trained=trained)
        made.append(
            Claim(
                f"rate_{trained}",
                f"{NAMES[trained].capitalize()}, width {width}: the rate at which the "
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
                f"{NAMES[trained].capitalize()}, width {wide}: unseen digits are not "
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
