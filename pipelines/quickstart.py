"""The whole grid in one process: prepare, train, evaluate, report.

What `dvc repro` does, without DVC and with one import of the framework. Prints the
answer and the paths of the table and the figures.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines import evaluate, prepare, report
from pipelines.layout import Layout
from pipelines.params import Params, load, parser
from pipelines.reporting import answer, texts

OUT = Path("build", "quickstart")


def main(*, params: Params | None = None, root: Path = OUT) -> Path:
    """Runs the grid and prints what came out.

    Args:
        params: The parameters; those of params.yaml by default.
        root: The folder of all files.

    Returns:
        The path of the table.
    """
    params, layout = params or load(), Layout(root)
    begin = time.perf_counter()
    run(params, root)
    table = report.main(params=params, root=root)
    _print_progress(
        f"{len(params.grid.runs())} runs in {time.perf_counter() - begin:.0f} s\n"
    )
    results = report.read(params, layout)
    print("\n\n".join(texts.answered(results, answer.modes(results)[:1])), end="\n\n")
    print(f"table:  {table}")
    for figure in report.figures(results, layout).values():
        print(f"figure: {figure}")
    print(f"page:   {layout.html}")
    return table


def run(params: Params, root: Path, *, skip_evaluated: bool = False) -> None:
    """Prepares, trains and evaluates all runs of a grid, without a report.

    Args:
        params: The parameters.
        root: The folder of all files.
        skip_evaluated: Whether to skip runs that have metrics.
    """
    layout = Layout(root)
    with _silent_stderr():
        import keras  # noqa: PLC0415

        from pipelines import explore, train  # noqa: PLC0415
    for dataset in params.grid.datasets:
        prepare.main(dataset, params=params, root=root)
    runs = params.grid.runs()
    for number, each in enumerate(runs, start=1):
        if skip_evaluated and layout.metrics(each).is_file():
            continue
        _print_progress(f"run {number} of {len(runs)}: {each.name}")
        # Frees what Keras keeps for each model.
        keras.utils.clear_session(free_memory=False)
        key = (each.dataset, each.augmentation, each.method, each.seed)
        if not layout.run(each.exploration).exists():
            explore.main(*key[:2], each.seed, params=params, root=root)
        train.main(*key, params=params, root=root)
        evaluate.main(*key, root=root)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides the messages of TensorFlow before its log level has an effect."""
    sys.stderr.flush()
    screen = os.dup(2)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def _print_progress(text: str) -> None:
    """Prints progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def cli(arguments: Sequence[str] | None = None) -> None:
    """The command line of `main`."""
    line = parser(__doc__)
    line.set_defaults(root=OUT)
    line.add_argument("--out", dest="root", type=Path, help=f"same as --root: {OUT}")
    given = line.parse_args(arguments)
    main(params=load(given.params), root=given.root)


if __name__ == "__main__":
    cli()
