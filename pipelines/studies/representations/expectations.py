"""What is expected of the study, with ranges that were fixed before it was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.studies.claims import Claim
from pipelines.studies.representations.heads import (
    KERNEL,
    LINEAR,
    NEURAL,
    PAIRS,
    QUADRATIC,
    RAW,
    UNGATED,
)
from pipelines.studies.representations.sizes import exponents, halves
from pipelines.studies.representations.target import PLAIN
from pipelines.studies.sample import by_seed

if TYPE_CHECKING:
    from pipelines.studies.sample import Row


def claims(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Claim]:
    """Exponents, their differences, certificates, and what does not show."""
    found = []
    measured = {pair: exponents(rows, *pair) for pair in PAIRS}
    best = measured[QUADRATIC, NEURAL]
    ranges = {
        (KERNEL, RAW): (2.8, 4.0),
        (KERNEL, NEURAL): (2.8, 4.0),
        (QUADRATIC, RAW): (2.6, 3.6),
        (QUADRATIC, NEURAL): (1.6, 2.6),
        (UNGATED, NEURAL): (1.6, 2.6),
    }
    for (head, inputs), (low, high) in ranges.items():
        name = _key(head, inputs)
        found.append(
            Claim(
                f"exponent_{name}",
                f"Exponent of the {head} head on {inputs} inputs: {low:g} to {high:g} "
                f"(theory: {PAIRS[head, inputs]})",
                measured[head, inputs],
                low=low,
                high=high,
            )
        )
    for head, inputs in ((KERNEL, RAW), (KERNEL, NEURAL), (QUADRATIC, RAW)):
        found.append(
            Claim(
                f"above_{_key(head, inputs)}",
                f"The exponent of the {head} head on {inputs} inputs is at least 0.5 "
                "above that of the quadratic head on the representation",
                np.subtract(measured[head, inputs], best).tolist(),
                low=0.5,
            )
        )
    points, d = halves(rows), max(settings["dimensions"])

    def half(inputs: str) -> list[float]:
        return by_seed(
            points,
            "n",
            max,
            lambda r: (r["head"], r["input"], r["d"]) == (KERNEL, inputs, d),
        )

    found.append(
        Claim(
            "kernel_gains_nothing",
            f"The tangent kernel takes no fewer samples on the representation than on "
            f"raw inputs, d = {d}: their ratio is at least 1",
            np.divide(half(NEURAL), half(RAW)).tolist(),
            low=1.0,
        )
    )
    found += [_linear_claim(rows, inputs, d) for inputs in (RAW, NEURAL)]
    return [*found, *_certificate_claims(rows, settings), *_limit_claims(rows)]


def _linear_claim(rows: Sequence[Row], inputs: str, d: int) -> Claim:
    return Claim(
        f"linear_{inputs}",
        f"The linear head on {inputs} inputs does not learn, d = {d}: error above 0.9 "
        "with the largest number of samples",
        by_seed(
            rows,
            "error",
            max,
            lambda r: (
                r["kind"] == "samples"
                and (r["head"], r["input"], r["d"]) == (LINEAR, inputs, d)
            ),
        ),
        low=0.9,
    )


def _certificate_claims(
    rows: Sequence[Row], settings: Mapping[str, Any]
) -> Iterator[Claim]:
    given = settings["certificate"]

    def relative(head: str, width: int) -> list[float]:
        return by_seed(
            rows,
            "relative",
            max,
            lambda r: (
                r["kind"] == "certificate" and (r["head"], r["width"]) == (head, width)
            ),
        )

    few, many, ungated = min(given["widths"]), max(given["widths"]), given["ungated"]
    yield Claim(
        "certificate_ungated",
        f"Without gates and with {max(ungated)} units, the objective is certified to "
        "within 1e-6 of itself",
        relative(UNGATED, max(ungated)),
        high=1e-6,
    )
    yield Claim(
        "certificate_many",
        f"With gates and {many} units, to within 1e-3 of itself",
        relative(QUADRATIC, many),
        high=1e-3,
    )
    yield Claim(
        "certificate_few",
        f"With gates and {few} units the certificate says little: above 0.1",
        relative(QUADRATIC, few),
        low=0.1,
    )


def _limit_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    limits = [row for row in rows if row["kind"] == "limit"]
    few, many = min(r["n"] for r in limits), max(r["n"] for r in limits)

    def error(case: str, head: str, n: int, key: str = "error") -> list[float]:
        return by_seed(
            limits,
            key,
            max,
            lambda r: (r["case"], r["head"], r["n"]) == (case, head, n),
        )

    ratios = {
        n: np.divide(error(PLAIN, QUADRATIC, n), error(PLAIN, KERNEL, n)).tolist()
        for n in (few, many)
    }
    yield Claim(
        "plain_few",
        f"Does not show for z^4 as it is: with {few} samples the quadratic head's "
        "error on the representation is above the tangent kernel's (ratio above 1)",
        ratios[few],
        low=1.0,
    )
    yield Claim(
        "plain_many",
        f"It does with {many} samples (ratio below 1)",
        ratios[many],
        high=1.0,
    )
    yield Claim(
        "step_units",
        f"Does not show with step units in the representation: error above 0.9 with "
        f"{many} samples",
        error("step units", QUADRATIC, many),
        low=0.9,
    )
    yield Claim(
        "step_beyond",
        "Their span lacks more than half of the square of one direction",
        error("step units", QUADRATIC, many, "beyond"),
        low=0.5,
    )


def _key(head: str, inputs: str) -> str:
    return f"{head} {inputs}".replace(",", "").replace(" ", "_")
