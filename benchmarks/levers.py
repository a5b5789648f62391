"""What each lever of the default is worth, alone and together, on the same trunks.

For each data set of the profile `cpu`, with and without augmentation, and seed, three
trunks are trained: with the profile's recipe, with one that ends with exploration, and
on nine tenths of the samples. Each row of `VARIANTS` goes on from one of them, with one
lever moved from its place in the default. Rows are compared with the default in pairs.

Trunks and rows are kept in `--cache`: a run that was killed goes on from there. Empty
it after a change of the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

import keras_dalign as kd
from benchmarks import common
from benchmarks.cells import PARAMS, mean_and_error
from benchmarks.common import Target
from keras_dalign.numerics.losses import SoftmaxCrossEntropy
from keras_dalign.solving.head_solver import HeadSolver, first_width
from keras_dalign.solving.options import BASE, ORIGIN, SolveOptions
from keras_dalign.training.switch import switch
from keras_dalign.training.weight_average import WeightAverage
from pipelines import datasets, files, prepare
from pipelines.calibration import brier, ece, nll
from pipelines.evaluate import error_rate
from pipelines.exploration import Job
from pipelines.held_out import held_out
from pipelines.layout import Layout
from pipelines.optimizers import optimizer
from pipelines.params import Params, Recipe, Run, load
from pipelines.stream import FollowEpoch, augmented

if TYPE_CHECKING:
    from keras_dalign.head.features import FeatureSet

# The trunks: with the profile's recipe, with one that ends with exploration, and with
# the profile's on a part of the samples.
WHOLE, ENDED, PART = "whole", "ended", "part"
# Of the epochs, explored by the default; of the samples, left out of `PART`.
EXPLORE, LEFT_OUT = 0.6, 0.1
EXPLORED = (0.6, 0.7, 0.8, 1.0)
AVERAGES = (0.05, 0.1, 0.2)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Measured = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to train; the default is `DAlign(Adam())`.

    Attributes:
        lever: The lever that is moved.
        trunk: `WHOLE`, `ENDED` or `PART`.
        explore: The share of the epochs after which the trunk is taken.
        average: The share of the steps that its weights are averaged over; 0 takes the
            last weights.
        solve: Whether a head is solved; False leaves the base model.
        reestimate: Whether batch-norm statistics are re-estimated.
        center: Where the L2 term is zero.
        unseen: Whether L2 weight and width are chosen on the samples that were left out
            of `PART`; otherwise on a fifth of the training samples.
        refit: Whether the head is then solved on all samples, with the same weight and
            width.
        passes: Augmented passes whose features are taken; 0 takes those of the images
            as they are.
        averaged: Whether the features of an image are averaged over the passes;
            otherwise they are stacked: each pass adds all samples.
    """

    lever: str
    trunk: str = WHOLE
    explore: float = EXPLORE
    average: float = 0.1
    solve: bool = True
    reestimate: bool = True
    center: str = ORIGIN
    unseen: bool = False
    refit: bool = False
    passes: int = 0
    averaged: bool = False


base_model = functools.partial(Variant, "base model", explore=1.0, solve=False)
DEFAULT, NONE, BASE_MODEL = "default", "no lever", "base"
VARIANTS = {
    DEFAULT: Variant("default"),
    NONE: Variant("default", average=0.0, center=BASE),
    "last weights": Variant("weights", average=0.0),
    "average over 0.05": Variant("weights", average=0.05),
    "average over 0.2": Variant("weights", average=0.2),
    "centre: base": Variant("centre", center=BASE),
    "trunk of 9/10, judged on seen samples, solved on all": Variant(
        "judge", trunk=PART
    ),
    "trunk of 9/10, judged on the rest, solved on 9/10": Variant(
        "judge", trunk=PART, unseen=True
    ),
    "trunk of 9/10, judged on the rest, solved on all": Variant(
        "judge", trunk=PART, unseen=True, refit=True
    ),
    "1 augmented pass": Variant("passes", passes=1),
    "2 passes, stacked": Variant("passes", passes=2),
    "4 passes, stacked": Variant("passes", passes=4),
    "8 passes, stacked": Variant("passes", passes=8),
    "2 passes, averaged": Variant("passes", passes=2, averaged=True),
    "4 passes, averaged": Variant("passes", passes=4, averaged=True),
    "8 passes, averaged": Variant("passes", passes=8, averaged=True),
    "ends with exploration": Variant("schedule", trunk=ENDED),
    "ends with exploration, last weights": Variant(
        "schedule", trunk=ENDED, average=0.0
    ),
    "explore 0.7": Variant("explore", explore=0.7),
    "explore 0.8": Variant("explore", explore=0.8),
    "explore 1.0": Variant("explore", explore=1.0),
    "explore 1.0, last weights": Variant("together", explore=1.0, average=0.0),
    "explore 1.0, 4 passes, stacked": Variant("together", explore=1.0, passes=4),
    "ends with exploration, 4 passes, stacked": Variant(
        "together", trunk=ENDED, passes=4
    ),
    BASE_MODEL: base_model(average=0.0, reestimate=False),
    "base, re-estimated": base_model(average=0.0),
    "base, averaged and re-estimated": base_model(),
}

ABOUT = (
    "Means over cells and seeds of the difference to the row `default`, paired: test "
    "error in points, with the standard error over the pairs; ratio of the test NLL; "
    "expected calibration error (15 bins) in points; Brier score; ratios of the "
    "seconds, exploration included. Ratios are geometric means. The default: weights "
    "averaged over 0.1 of the steps, the centre at the origin, L2 weight and width "
    "chosen on training samples, images as they are, the recipe's schedule cut after "
    "0.6 of the epochs. `no lever` has the last weights and the base's function as "
    "centre. Passes are of augmented cells alone: weight and width are chosen on the "
    "first one where they are stacked. Averages are kept beside the runs, and the "
    "seconds are without them. Steps are timed on the trunk of all samples, and count "
    "as much on the others."
)
BY_CELL = "by cell: the default's, and the differences to it, means over the seeds."


class Trunks:
    """The trunks of a cell and seed, each trained when it is first asked for.

    Args:
        job: What to train on, and how.
        folder: Where they are kept.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder

    def model(self, variant: Variant) -> keras.Model:
        """The base model that a variant goes on from.

        Args:
            variant: The variant.

        Returns:
            The model, not compiled.
        """
        self._train(variant.trunk)
        path = self._weights(variant.trunk, self.epoch(variant), variant.average)
        model = self.job.base()
        names = [f"{index:04d}" for index in range(len(model.weights))]
        model.set_weights(list(files.read_arrays(path, *names)))
        return model

    def seconds(self, variant: Variant) -> float:
        """Wall time of the exploration of a variant, without its averages.

        Steps of all trunks are equal, so they are timed on one of them.

        Args:
            variant: The variant.

        Returns:
            The seconds.
        """
        self._train(WHOLE)
        kept = files.read_json(self._record(WHOLE), "seconds")["seconds"]
        steps = part_of(self.job).steps if variant.trunk == PART else self.job.steps
        return float(sum(kept[: self.epoch(variant)]) * steps / self.job.steps)

    def epoch(self, variant: Variant) -> int:
        """The epoch after which its trunk is taken."""
        return max(1, round(variant.explore * self.job.train.epochs))

    def _train(self, trunk: str) -> None:
        if self._record(trunk).exists():
            return
        job, recipe, epochs = self.job, self.job.recipe, self.job.train.epochs
        explored = max(1, round(EXPLORE * epochs))
        if trunk == PART:
            job = part_of(job)
        if trunk == ENDED:
            how = ended(recipe, job.steps, explored)
        else:
            how = optimizer(recipe, job.steps, epochs)
        shares = EXPLORED if trunk == WHOLE else (EXPLORE,)
        kept = {max(1, round(share * epochs)) for share in shares}

        def keep(epoch: int, average: float, weights: list[np.ndarray]) -> None:
            arrays = {f"{index:04d}": array for index, array in enumerate(weights)}
            files.write_arrays(self._weights(trunk, epoch, average), arrays)

        self.folder.mkdir(parents=True, exist_ok=True)
        model, stream, averages = job.base(), job.stream(), Averages(keep, kept)
        model.compile(how, LOSS)
        callbacks = [FollowEpoch(stream), averages]
        model.fit(
            stream, epochs=max(kept), shuffle=False, verbose=0, callbacks=callbacks
        )
        files.write_json(self._record(trunk), {"seconds": averages.seconds})

    def _record(self, trunk: str) -> Path:
        """Written last: it says that the trunk is complete."""
        return self.folder / f"{trunk}.json"

    def _weights(self, trunk: str, epoch: int, average: float) -> Path:
        return self.folder / f"{trunk}-{epoch:03d}-{average}.npz"


class Averages(keras.callbacks.Callback):
    """Keeps the last weights and running averages of them after some epochs.

    Args:
        keep: Takes the epoch, from 1, the share that weights are averaged over, and the
            weights; share 0 are the last ones.
        epochs: The epochs.

    Attributes:
        seconds: Wall time by epoch, without what this callback takes.
    """

    def __init__(
        self, keep: Callable[[int, float, list[np.ndarray]], None], epochs: set[int]
    ) -> None:
        super().__init__()
        self._keep, self._epochs = keep, epochs
        self.seconds: list[float] = []
        self._begin = 0.0
        self._averages: list[WeightAverage] = []

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        variables = self.model.trainable_variables
        self._averages = [
            WeightAverage(
                variables,
                share,
                _zeros,
                keras.Variable(0, trainable=False, dtype="int32"),
            )
            for share in AVERAGES
        ]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        begin = time.perf_counter()
        # JAX's trainer hands its state around, and syncs when asked.
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        for average in self._averages:
            average.update()
        self._begin += time.perf_counter() - begin

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Keras's hook."""
        self.seconds.append(time.perf_counter() - self._begin)
        if epoch + 1 not in self._epochs:
            return
        self._keep(epoch + 1, 0.0, self.model.get_weights())
        for average in self._averages:
            pairs = zip(average.averaged, average.averages, strict=True)
            of = {id(variable): value for variable, value in pairs}
            weights = [of.get(id(each), each) for each in self.model.weights]
            values = [np.array(ops.convert_to_numpy(each)) for each in weights]
            self._keep(epoch + 1, average.share, values)


def _zeros(variable: keras.Variable, name: str) -> keras.Variable:
    return keras.Variable(
        np.zeros(variable.shape), dtype=variable.dtype, trainable=False, name=name
    )


def ended(recipe: Recipe, steps: int, epochs: int) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe whose learning rate is zero at the end of exploration.

    Args:
        recipe: The recipe. A constant rate falls over the last third.
        steps: Steps of an epoch.
        epochs: Epochs of exploration.

    Returns:
        An optimizer that was not used yet.
    """
    how = optimizer(recipe, steps, epochs)
    if recipe.schedule == "constant":
        how.learning_rate = FallingEnd(recipe.learning_rate, steps * epochs)
    return how


class FallingEnd(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that falls to zero over the last third of the steps.

    Args:
        rate: The first learning rate.
        steps: Steps until zero.
    """

    def __init__(self, rate: float, steps: int) -> None:
        super().__init__()
        self.rate, self.steps = rate, steps

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step."""
        left = 1.0 - ops.cast(step, "float32") / self.steps
        return self.rate * ops.clip(3.0 * left, 0.0, 1.0)


def part_of(job: Job) -> Job:
    """The job on nine tenths of the samples, with the rest in place of the test's."""
    data = held_out(job.data, LEFT_OUT, job.run.seed)
    return dataclasses.replace(job, data=data)


def finished(job: Job, variant: Variant, trunks: Trunks) -> Measured:
    """Finishes a run, and measures it.

    Args:
        job: What to train on, and how.
        variant: The way to train.
        trunks: Those of the job.

    Returns:
        On the test samples `error` and `ece` in percent, `nll` and `brier`; `seconds`,
        exploration included; and where a head was solved, `l2`, `width` and `gap`.
    """
    model = trunks.model(variant)
    begin = time.perf_counter()
    found: Measured = {}
    if variant.passes:
        model, found = solved_on_passes(job, variant, model)
    elif variant.solve:
        model, found = solved(job, variant, model)
    elif variant.reestimate:
        kd.reestimate_batch_norm(model, job.data.x_train)
    seconds = trunks.seconds(variant) + time.perf_counter() - begin
    logits = np.asarray(model.predict(job.data.x_test, batch_size=256, verbose=0))
    labels = job.data.y_test
    return {
        "error": 100.0 * error_rate(logits, labels),
        "nll": nll(logits, labels),
        "ece": 100.0 * ece(logits, labels),
        "brier": brier(logits, labels),
        "seconds": seconds,
        **found,
    }


def solved(
    job: Job, variant: Variant, trunk: keras.Model
) -> tuple[keras.Model, Measured]:
    """Solves a head on the images as they are, as a user would."""
    whole = job.data
    data = part_of(job).data if variant.unseen else whole
    judges = (data.x_test, data.y_test) if variant.unseen else None
    settings: dict[str, Any] = {"loss": LOSS, "center": variant.center, "verbose": 0}
    model = _aligned(job, trunk)
    found = kd.solve(
        model, data.x_train, data.y_train, validation_data=judges, **settings
    )
    if variant.refit:
        with warnings.catch_warnings():
            # An L2 term needs no width that fits any labels.
            warnings.filterwarnings("ignore", message="The head is too narrow")
            model = _aligned(job, trunk, width=found.width)
        found = kd.solve(model, whole.x_train, whole.y_train, l2=found.l2, **settings)
    return model, {"l2": found.l2, "width": found.width, "gap": found.gap}


def solved_on_passes(
    job: Job, variant: Variant, trunk: keras.Model
) -> tuple[keras.Model, Measured]:
    """Solves a head on the features of several augmented passes.

    Where they are stacked, L2 weight and width are chosen on the first pass: otherwise
    the samples held out would be copies of those that are trained on.

    Args:
        job: What to train on, and how.
        variant: The way to train, with one pass or more.
        trunk: The base model to go on from.

    Returns:
        The model, and `l2`, `width` and `gap`.

    Raises:
        RuntimeError: If the switch kept no features.
    """
    n = len(job.data.x_train)
    x = np.concatenate(
        [
            augmented(
                job.data.x_train,
                np.random.default_rng([job.run.seed, index]),
                **job.train.augment,
            )
            for index in range(variant.passes)
        ]
    )
    y = np.tile(job.data.y_train, variant.passes)
    model, options = _aligned(job, trunk), SolveOptions(center=variant.center)
    _, features = switch(
        model,
        x,
        y,
        width=first_width(model.head, options),
        rank_matters=False,
        replace_dense=options.replaces_dense(model.head.gates),
        keep_features=True,
        digest=True,
    )
    if features is None:
        raise RuntimeError("The switch kept no features.")
    few = merged(features, n, averaged=variant.averaged)
    loss = SoftmaxCrossEntropy()
    solution = HeadSolver(
        model.head, few, loss, options, set_width=model.set_width
    ).solve()
    if variant.passes > 1 and not variant.averaged:
        options = dataclasses.replace(options, l2=solution.l2)
        solution = HeadSolver(model.head, features, loss, options).solve()
    return model, {
        "l2": solution.l2,
        "width": model.head.width,
        "gap": solution.gap,
    }


def merged(features: FeatureSet, n: int, *, averaged: bool) -> FeatureSet:
    """One row for each image, of the features of several passes over them.

    Args:
        features: Those of all passes, one after the other.
        n: Number of images.
        averaged: Whether to average them; otherwise the first pass is taken.

    Returns:
        The features of `n` samples.
    """

    def of_image(leaf: np.ndarray) -> np.ndarray:
        passes = leaf.reshape(-1, n, *leaf.shape[1:])
        return passes.mean(axis=0) if averaged else passes[0]

    return dataclasses.replace(
        features,
        z=keras.tree.map_structure(of_image, features.z),
        y=features.y[:n],
        digests=(features.digests or [])[:n],
    )


def _aligned(job: Job, trunk: keras.Model, **head: Any) -> kd.AlignedModel:
    n = len(job.data.x_train)
    return kd.align(trunk, n_samples=n, seed=job.run.seed, copy=True, **head)


def read(
    folder: Path, name: str, params: Params, cache: Path
) -> tuple[datasets.Dataset, str]:
    """A data set of the profile, as `prepare` draws it, and its hash."""
    size = params.prepare[name]
    root = cache / f"{name}-{size.n_train}-{size.n_test}-{size.split_seed}"
    layout = Layout(root)
    if not layout.description(name).exists():
        prepare.main(name, params=params, root=root, import_from=folder)
    data, description = datasets.read(layout, name)
    return data, description["sha256"]


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure(
    options: argparse.Namespace, cells: Sequence[tuple[str, str]]
) -> list[Measured]:
    """All variants on some cells.

    Args:
        options: `data`, `cache` and `seeds`.
        cells: Names of data set and augmentation.

    Returns:
        For each cell and seed `data`, `augmentation`, `seed`, and by variant what
        `finished` measured.
    """
    params = load(PARAMS)
    found: list[Measured] = []
    for name, of_data in itertools.groupby(cells, lambda cell: cell[0]):
        data, sha256 = read(options.data, name, params, options.cache)
        for (_, augmentation), seed in itertools.product(of_data, range(options.seeds)):
            job = Job.of(Run(name, augmentation, "levers", seed), params, data)
            if not found:
                warm_up(job)
            how = (job.train.model, job.train.epochs, job.train.batch_size, job.augment)
            key = _digest(dataclasses.asdict(job.recipe), how, sha256)
            begin = time.perf_counter()
            rows = _rows(job, options.cache / f"{job.run.name}-{key}")
            found.append(
                {"data": name, "augmentation": augmentation, "seed": seed, **rows}
            )
            errors = ", ".join(
                f"{row} {rows[row]['error']:.2f} %" for row in (BASE_MODEL, DEFAULT)
            )
            spent = time.perf_counter() - begin
            print(f"{job.run.name}: {errors} ({spent:.0f} s)", flush=True)
            keras.utils.clear_session()
    return found


def warm_up(job: Job) -> None:
    """Takes one step and one solve, so that no row pays for the first ones."""
    model, size = job.base(), job.train.batch_size
    model.compile(optimizer(job.recipe, job.steps, 1), LOSS)
    x, y = job.data.x_train[:size], job.data.y_train[:size]
    model.fit(x, y, batch_size=size, verbose=0)
    kd.solve(kd.align(model, n_samples=len(x)), x, y, verbose=0)


def _rows(job: Job, folder: Path) -> dict[str, Measured]:
    """What the variants give, by name: measured, or as it was kept."""
    trunks, rows = Trunks(job, folder), {}
    for name, variant in VARIANTS.items():
        if variant.passes and job.augment is None:
            continue
        path = folder / f"row-{_digest(dataclasses.asdict(variant))}.json"
        if not path.exists():
            files.write_json(path, finished(job, variant, trunks))
        rows[name] = files.read_json(path, "error", "nll", "seconds")
    return rows


def pairs(
    cells: Sequence[Measured], name: str, other: str = DEFAULT
) -> Iterator[tuple[Measured, Measured]]:
    """What two variants gave, cell by cell and seed by seed, where both were run."""
    for cell in cells:
        if name in cell and other in cell:
            yield cell[name], cell[other]


def difference(cells: Sequence[Measured], name: str, key: str) -> tuple[float, float]:
    """What a variant has more than the default: the mean, and its standard error."""
    return mean_and_error([a[key] - b[key] for a, b in pairs(cells, name)])


def ratio(
    cells: Sequence[Measured], name: str, key: str, other: str = DEFAULT
) -> float:
    """The geometric mean of a variant's number over another one's."""
    logs = [math.log(a[key] / b[key]) for a, b in pairs(cells, name, other)]
    return math.exp(fmean(logs))


def summary(cells: Sequence[Measured]) -> str:
    """One line for each variant: its mean difference to the default."""
    lines = []
    for name, variant in VARIANTS.items():
        count = len(list(pairs(cells, name)))
        if not count:
            continue
        error, spread = difference(cells, name, "error")
        lines.append(
            [
                variant.lever,
                name,
                f"{count}",
                f"{error:+.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}"),
                f"{ratio(cells, name, 'nll'):.3f}",
                f"{difference(cells, name, 'ece')[0]:+.2f}",
                f"{difference(cells, name, 'brier')[0]:+.4f}",
                f"{ratio(cells, name, 'seconds'):.2f}",
                f"{ratio(cells, name, 'seconds', BASE_MODEL):.2f}",
            ]
        )
    header = ["lever", "row", "pairs", "error, points", "NLL", "ECE", "Brier"]
    return common.table([*header, "time", "time / base"], lines)


def by_cell(cells: Sequence[Measured], key: str, digits: int) -> str:
    """Means over the seeds: the default's number, and the differences to it."""
    named: dict[str, list[Measured]] = {}
    for cell in cells:
        named.setdefault(_name(cell["data"], cell["augmentation"]), []).append(cell)
    lines = []
    for name in VARIANTS:
        line = [name]
        for of_cell in named.values():
            if name == DEFAULT:
                number = fmean(cell[DEFAULT][key] for cell in of_cell)
                line.append(f"{number:.{digits}f}")
            elif list(pairs(of_cell, name)):
                line.append(f"{difference(of_cell, name, key)[0]:+.{digits}f}")
            else:
                line.append("")
        if any(line[1:]):
            lines.append(line)
    return common.table(["row", *named], lines)


def missing(cells: Sequence[tuple[str, str]], seeds: int) -> str:
    """Which cells of the profile were measured, on how many seeds, and which not."""
    every = [_name(*cell) for cell in cells_of(load(PARAMS))]
    done = [_name(*cell) for cell in cells]
    text = f"Measured: {len(done)} of {len(every)} cells, seeds 0 to {seeds - 1}."
    left = [name for name in every if name not in done]
    return f"{text} Not measured: {', '.join(left)}." if left else text


def cells_of(params: Params) -> list[tuple[str, str]]:
    """Data sets and augmentations of a profile."""
    return list(itertools.product(params.grid.datasets, params.grid.augmentations))


def _name(data: str, augmentation: str) -> str:
    return f"{data}-{augmentation}"


def targets_of(cells: Sequence[Measured]) -> list[Target]:
    """The figures that must be shown."""
    error, _ = difference(cells, NONE, "error")
    solved_rows = [name for name, variant in VARIANTS.items() if variant.solve]
    gaps = [cell[name]["gap"] for cell in cells for name in solved_rows if name in cell]
    targets = [
        Target("default: points of test error more than without levers", -error, 0.0),
        Target("largest gap of the regularised loss", max(gaps), 1e-6),
    ]
    for augmentation, bound in (("none", 0.75), ("standard", 0.85)):
        part = [cell for cell in cells if cell["augmentation"] == augmentation]
        if part:
            claim = f"default: time over the base's, augmentation {augmentation}"
            measured = ratio(part, DEFAULT, "seconds", BASE_MODEL)
            targets.append(Target(claim, measured, bound))
    return targets


def _options(parser: argparse.ArgumentParser) -> None:
    names = [_name(*cell) for cell in cells_of(load(PARAMS))]
    common.add_data_folder(parser, "semeion", "mnist", "cifar10", "cifar100")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "keras-dalign-levers",
        help="folder for the data, the trunks and the rows",
    )
    parser.add_argument(
        "--cells", nargs="+", choices=names, default=names, metavar="CELL", help="cells"
    )


def main() -> None:
    """Measures, prints and writes the results."""
    options = common.arguments(__doc__, seeds=3, more=_options)
    common.warm_up()
    chosen = [cell for cell in cells_of(load(PARAMS)) if _name(*cell) in options.cells]
    cells = measure(options, chosen)
    common.write(
        options.out,
        "levers",
        title="What each lever is worth",
        body=[
            missing(chosen, options.seeds),
            ABOUT,
            summary(cells),
            f"Test error, %, {BY_CELL}",
            by_cell(cells, "error", 2),
            f"Test NLL, {BY_CELL}",
            by_cell(cells, "nll", 3),
        ],
        targets=targets_of(cells),
        settings={
            "profile": "cpu",
            "explore": EXPLORE,
            "left out": LEFT_OUT,
            "variants": {k: dataclasses.asdict(v) for k, v in VARIANTS.items()},
        },
        measurements=cells,
    )


if __name__ == "__main__":
    main()
