"""Error and time against the share of epochs that is explored, without augmentation.

One method, started from the base training of each seed at several epochs; at the last
one it is post hoc, on the finished base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

import keras_dalign as kd
from pipelines import datasets, files, methods, provenance
from pipelines.evaluate import cross_entropy, error_rate
from pipelines.exploration import Exploration, Job, objective
from pipelines.layout import Layout
from pipelines.params import Params, Run, load, parser
from pipelines.train import warm_up

if TYPE_CHECKING:
    from pipelines.methods import Trained

_BASES = ("base", "base_bn")


def main(dataset: str, *, params: Params | None = None, root: Path = Path()) -> Path:
    """Measures the frontier of a data set.

    Args:
        dataset: Name of a prepared data set, whose explorations are there.
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The path of the points.
    """
    params, layout = params or load(), Layout(root)
    data, description = datasets.read(layout, dataset)
    warm_up()
    found: dict[str, list[dict[str, Any]]] = {"points": []}
    for seed in params.grid.seeds:
        run = Run(dataset, "none", params.frontier.method, seed)
        job = Job.of(run, params, data)
        explored = Exploration.read(job, layout)
        for share in params.frontier.explore:
            settings = {**params.methods[params.frontier.method], "explore": share}
            point = _point(job, settings, explored, layout)
            found["points"].append({"seed": seed, "explore": share, **point})
        for name in _BASES:
            point = _point(job, dict(params.methods[name]), explored, layout)
            found.setdefault(name, []).append({"seed": seed, **point})
    made_with = {
        **datasets.cited(description),
        "method": params.frontier.method,
        **provenance.environment(),
    }
    files.write_json(layout.frontier(dataset), {**found, "provenance": made_with})
    return layout.frontier(dataset)


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
        "train_loss": cross_entropy(train, data.y_train),
        "gap": certificate.gap,
    }


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__, "dataset").parse_args(arguments)
    main(line.dataset, params=load(line.params), root=line.root)


if __name__ == "__main__":
    cli()
