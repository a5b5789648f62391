"""The answer: the default and *better* against the best base of equal time.

A cell is a data set with an augmentation. In each, a mode is held against the base with
the lowest test error among those that took no more time than the mode. Its test NLL is
held against the base with the lowest NLL among these and the temperature-scaled base,
whatever time that took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipelines.reporting.comparison import Estimate, interval, points
from pipelines.reporting.results import (
    BASES,
    BETTER,
    DEFAULT,
    NOT_RECORDED,
    NOT_RUN,
    TIME_REFERENCE,
    Results,
)
from pipelines.reporting.table import Table

# By name: what a mode is called, and how it is written.
MODES = {
    DEFAULT: ("the default", "`DAlign(Adam())`"),
    BETTER: ("the mode *better*", "`DAlign(Adam(), explore=1.0)`"),
}
# More test error, as a share, that still counts as no worse. Fixed beforehand.
MARGIN = 0.003
MARGINS = {"cifar100": 0.005}
BETTER_WORD, NO_WORSE, WORSE = "better", "no worse", "worse"
# Means of error rates differ by whole samples: this is rounding, nothing else.
ROUNDING = 1e-12

_SHORT, _LONG, _TEMPERATURE = "base_short", "base_long", "base_temperature"
_WORDS = (
    *("no", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)


@dataclass(frozen=True)
class Answer:
    """A mode against the best base of equal time in a cell.

    Attributes:
        cell: Names of the data set and the augmentation.
        mode: Name of the method.
        base: The base with the lowest test error; None if none can be compared.
        nll_base: The base with the lowest NLL; None if none can be compared.
        error: Test error less that of `base`, or None.
        nll: NLL less that of `nll_base`, or None.
        time: Wall time over that of the base, or None.
        gap: The largest certified gap over the seeds, of the loss that was minimised:
            the regularised one if there is an L2 term. None if not run.
    """

    cell: tuple[str, str]
    mode: str
    base: str | None
    nll_base: str | None
    error: Estimate | None
    nll: Estimate | None
    time: Estimate | None
    gap: float | None

    @property
    def margin(self) -> float:
        """More test error, as a share, that still counts as no worse."""
        return margin(self.cell[0])

    @property
    def word(self) -> str:
        """The verdict on the test error: better, no worse or worse by the margin."""
        if self.error is None:
            return NOT_RUN
        if self.error.value > self.margin + ROUNDING:
            return WORSE
        return BETTER_WORD if self.error.value <= ROUNDING - self.margin else NO_WORSE

    @property
    def lower_nll(self) -> bool:
        """Whether the NLL is lower than the base's."""
        return self.nll is not None and self.nll.value < 0


def margin(dataset: str) -> float:
    """More test error, as a share, that still counts as no worse on a data set."""
    return MARGINS.get(dataset, MARGIN)


def modes(results: Results) -> list[str]:
    """The modes that are in the grid."""
    return [mode for mode in MODES if mode in results.params.grid.methods]


def answers(results: Results, mode: str) -> list[Answer]:
    """Holds a mode against the best base of equal time in every cell.

    Args:
        results: The results.
        mode: Name of the method.

    Returns:
        One answer a cell, in the grid's order.
    """
    return [_answer(results, cell, mode) for cell in results.groups()]


def missing() -> str:
    """What to say of a grid without modes."""
    names = " nor ".join(f"`{mode}`" for mode in MODES)
    return f"Neither {names} is in this grid: there is nothing to answer."


def known(results: Results, mode: str) -> list[Answer]:
    """The answers in the cells in which the mode and a base were run."""
    return [each for each in answers(results, mode) if each.error is not None]


def _answer(results: Results, cell: tuple[str, str], mode: str) -> Answer:
    rivals = _in_time(results, cell, mode)
    base = min(
        rivals,
        key=lambda each: (
            fmean(results.numbers(*cell, each, "error_rate")),
            fmean(results.numbers(*cell, each, "nll") or [float("inf")]),
        ),
        default=None,
    )
    nlls = {
        each: fmean(values)
        for each in dict.fromkeys((*rivals, _TEMPERATURE))
        if (values := results.numbers(*cell, each, "nll"))
    }
    nll_base = min(nlls, key=lambda each: nlls[each], default=None)
    gaps = results.numbers(*cell, mode, "l2_gap") or results.numbers(*cell, mode, "gap")
    return Answer(
        cell,
        mode,
        base,
        nll_base,
        results.difference(*cell, mode, base) if base else None,
        results.difference(*cell, mode, nll_base, "nll") if nll_base else None,
        results.time_ratio(*cell, mode),
        max(gaps, default=None),
    )


def _in_time(results: Results, cell: tuple[str, str], mode: str) -> list[str]:
    """The bases that took no more time; `base_short` is made to take the same."""
    ours = results.numbers(*cell, mode, "seconds")
    found = []
    for base in BASES:
        theirs = results.numbers(*cell, base, "seconds")
        in_time = bool(ours and theirs) and fmean(theirs) <= fmean(ours)
        counts = base == _SHORT or (base != _LONG and in_time)
        if counts and results.of(*cell, base):
            found.append(base)
    return found


def table(results: Results, mode: str) -> Table:
    """One row a cell: test error, NLL, calibration, time, gap and verdict.

    Args:
        results: The results.
        mode: Name of the method.

    Returns:
        The table.
    """
    name, written = MODES[mode]
    rows = []
    for each in answers(results, mode):
        heading = results.heading(*each.cell)
        if each.error is None:
            ran = results.of(*each.cell, mode)
            lacking = "no base of equal time" if ran else NOT_RUN
            rows.append((heading, lacking, *["" if ran else NOT_RUN] * 8))
            continue
        rows.append(
            (
                heading,
                each.word,
                errors(results, each),
                interval(each.error),
                results.params.label(str(each.base)),
                _percent(results, each.cell, TIME_REFERENCE),
                _pair(results, each, each.nll_base, "nll", "{:#.3g}"),
                _pair(results, each, each.nll_base, "ece", "{:.1f}", 100),
                NOT_RECORDED if each.time is None else f"{each.time.value:.2f}",
                NOT_RECORDED if each.gap is None else f"{each.gap:.1e}",
            )
        )
    return Table(
        f"{_capital(name)}, {written}, against the best base of equal time",
        (
            "data",
            "verdict",
            "test error, %",
            "difference [95 % CI]",
            "best base",
            f"{results.params.label(TIME_REFERENCE)}: test error, %",
            "NLL",
            "ECE, %",
            "time / base",
            "certified gap",
        ),
        tuple(rows),
    )


def caption(results: Results) -> str:
    """What the columns of the table are."""
    seeds = len(results.params.grid.seeds)
    label = results.params.label
    scaled = ""
    if _TEMPERATURE in results.params.grid.methods:
        scaled = f' and "{label(_TEMPERATURE)}", whatever its time'
    return (
        "A cell is a data set with one kind of augmentation. Arrows go from the best "
        "base to ours. Best base: the one with the lowest mean test error among those "
        "that took no more time than ours. Difference: in points, paired by seed "
        f"({_count(seeds, 'seed')}). Verdict: better or worse if the mean difference "
        f"is at least the margin of {_margins(results)}, which was fixed beforehand, "
        "no worse in between; where the interval contains 0, the sign is uncertain. "
        f'"{label(TIME_REFERENCE)}": all epochs, whatever its time. NLL and ECE (15 '
        "bins), on test data: of the base with the lowest NLL among the same bases"
        f"{scaled}. Time / base: wall time over "
        f'that of "{label(TIME_REFERENCE)}", paired by seed, geometric mean. Certified '
        "gap: to the minimum of the training loss with its L2 term, at most; the "
        "largest over the seeds."
    )


def sentence(results: Results, mode: str) -> str:
    """The answer in words.

    Args:
        results: The results.
        mode: Name of the method.

    Returns:
        In how many cells the test error is better, no worse and worse, in how many
        the NLL is lower, and what time the mode takes.
    """
    name, written = MODES[mode]
    found = known(results, mode)
    n = len(found)
    if not found:
        return f"{_capital(name)}, {written}: {NOT_RUN} beside a base of equal time."
    where = f"in {_count(n, 'cell')} of {_cells(results, found)}"
    first = modes(results)[0]
    if mode != first and [each.cell for each in known(results, first)] == [
        each.cell for each in found
    ]:
        where = "in the same cells"
    words = [each.word for each in found]
    counted = ", ".join(
        f"{word} in {_some(words.count(word), n)}"
        for word in (BETTER_WORD, NO_WORSE, WORSE)
    )
    text = (
        f"{_capital(name)}, {written}, {where}, against the best base of equal time: "
        f"test error {counted}."
    )
    judged = [each for each in found if each.nll is not None]
    if judged:
        lower = _some(sum(each.lower_nll for each in judged), len(judged))
        scaled = ""
        if _TEMPERATURE in results.params.grid.methods:
            scaled = f', and than that of "{results.params.label(_TEMPERATURE)}",'
        text += f" NLL lower than that of every such base{scaled} in {lower}."
    if times := [each.time.value for each in found if each.time is not None]:
        text += f" Time: {_range(times)} of the base's."
    if lacking := len(results.groups()) - n:
        text += f" {_capital(_count(lacking, 'more cell'))}: {NOT_RUN}."
    return text


def against_long(results: Results) -> str:
    """Where the default has a lower test error than the base of twice the epochs.

    Args:
        results: The results.

    Returns:
        A sentence; empty if the two were not run in one cell.
    """
    won: list[str] = []
    lost: list[str] = []
    times = []
    for cell in results.groups():
        found = results.difference(*cell, DEFAULT, _LONG)
        if found is None:
            continue
        where = f"{results.heading(*cell)} ({points(found.value)} points)"
        (won if found.value < -ROUNDING else lost).append(where)
        if ratio := results.time_ratio(*cell, DEFAULT, _LONG):
            times.append(ratio.value)
    if not won + lost:
        return ""
    label = results.params.label(_LONG)
    within = f", in {_range(times)} of its time" if times else ""
    parts = [f"a lower test error on {'; '.join(won)}"] if won else []
    parts += [f"no lower one on {'; '.join(lost)}"] if lost else []
    return f'Against "{label}" the default has{within}: {", and ".join(parts)}.'


def errors(results: Results, found: Answer) -> str:
    """The test errors in %, from the best base's to the mode's."""
    return _pair(results, found, found.base, "error_rate", "{:.2f}", 100)


def _percent(results: Results, cell: tuple[str, str], method: str) -> str:
    """The mean test error of a method in %."""
    found = results.numbers(*cell, method, "error_rate")
    return f"{100 * fmean(found):.2f}" if found else NOT_RUN


def _pair(
    results: Results,
    answer: Answer,
    base: str | None,
    name: str,
    form: str,
    scale: float = 1.0,
) -> str:
    """The means of a number, from the base's to ours."""
    both = (str(base), answer.mode)
    numbers = [results.numbers(*answer.cell, each, name) for each in both]
    if not all(numbers):
        return NOT_RECORDED
    return " → ".join(form.format(scale * fmean(each)) for each in numbers)


def _cells(results: Results, found: Sequence[Answer]) -> str:
    """The data sets and augmentations of some answers."""
    titles = dict.fromkeys(results.title(each.cell[0]) for each in found)
    kinds = {each.cell[1] for each in found}
    if kinds == {"none"}:
        return f"{_list(titles)} without augmentation"
    both = "without and with" if "none" in kinds else "with"
    return f"{_list(titles)} {both} augmentation"


def _margins(results: Results) -> str:
    """The margins that apply to the grid."""
    text = f"{100 * MARGIN:g} points"
    others = [
        f"{100 * margin:g} on {results.title(name)}"
        for name, margin in MARGINS.items()
        if name in results.params.grid.datasets
    ]
    return text + (f" ({', '.join(others)})" if others else "")


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _some(k: int, n: int) -> str:
    if k == 0:
        return "none"
    return _word(k) if k < n or n == 1 else "all"


def _word(n: int) -> str:
    return _WORDS[n] if n < len(_WORDS) else f"{n:,}"


def _count(n: int, noun: str) -> str:
    return f"{_word(n)} {noun}{'s' * (n != 1)}"


def _list(texts: Sequence[str] | dict[str, None]) -> str:
    *first, last = texts or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
