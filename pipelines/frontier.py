"""Error and time against the share of epochs that is explored, without augmentation.

One method starts from the base training of a seed at several epochs. At the last one it
is applied post hoc, to the finished base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

import keras_dalign as kd
from pipelines import datasets, files, methods, provenance
from pipelines.calibration import nll
from pipelines.evaluate import error_rate
from pipelines.exploration import Exploration, Job, objective, warm_up
from pipelines.layout import Layout
from pipelines.params import Params, Run, load, parser

if TYPE_CHECKING:
    from pipelines.methods import Trained

_BASES = ("base", "base_bn")


def main(
    dataset: str,
    seed: int,
    *,
    params: Params | None = None,
    root: Path = Path(),
) -> Path:
    """Measures the frontier of a data set, from the base training of one seed.

    Args:
        dataset: Name of a prepared data set.
        seed: Seed of a finished exploration.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The path of the points.
    """
    params, layout = params or load(), Layout(root)
    data, description = datasets.read(layout, dataset)
    warm_up()
    method = params.frontier.method
    job = Job.of(Run(dataset, "none", method, seed), params, data)
    explored = Exploration.read(job, layout)
    found: dict[str, Any] = {"points": []}
    for share in params.frontier.explore:
        settings = {**params.methods[method], "explore": share}
        point = _point(job, settings, explored, layout)
        found["points"].append({"seed": seed, "explore": share, **point})
    for name in _BASES:
        point = _point(job, dict(params.methods[name]), explored, layout)
        found[name] = [{"seed": seed, **point}]
    made_with = {
        **datasets.cited(description),
        "method": method,
        **provenance.environment(),
    }
    path = layout.frontier(dataset, seed)
    files.write_json(path, {**found, "provenance": made_with})
    return path


def _point(
    job: Job, settings: dict[str, Any], explored: Exploration, layout: Layout
) -> dict[str, float]:
    keras.utils.clear_session(free_memory=False)
    trained: Trained = methods.finish(
        job, settings, lambda: explored, layout.backup(job.run)
    )
    model, data = trained.model, job.data
    logits = model.predict(data.x_test, batch_size=256, verbose=0)
    certificate = kd.certify(
        model, data.x_train, data.y_train, loss=objective()["loss"]
    )
    train = model.predict(data.x_train, batch_size=256, verbose=0)
    return {
        "seconds": round(sum(trained.phases.values()), 2),
        "error_rate": error_rate(logits, data.y_test),
        "nll": nll(logits, data.y_test),
        "train_loss": nll(train, data.y_train),
        "gap": certificate.gap,
    }


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset", "seed").parse_args(arguments)
    main(line.dataset, line.seed, params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
