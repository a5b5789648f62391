"""Made-up parameters and results, for temporary folders only."""

from pathlib import Path

import yaml

from pipelines import files
from pipelines.layout import Layout
from pipelines.params import Params, Run, load

METHODS = {
    "base": {"kind": "base"},
    "base_bn": {"kind": "base", "reestimate": True},
    "base_swa": {"kind": "base", "average": True, "reestimate": True},
    "base_temperature": {"kind": "base", "reestimate": True, "temperature": 0.1},
    "base_short": {"kind": "base", "epochs": 0.7},
    "base_long": {"kind": "base", "epochs": 2.0},
    "dalign": {"kind": "two_phase", "exploit": "solve", "l2": "auto"},
    "dalign_better": {"kind": "two_phase", "exploit": "solve", "explore": 1.0},
    "letter": {"kind": "two_phase", "gates": "learned"},
    "two_phase_random": {"kind": "two_phase", "gates": "random"},
    "solve": {"kind": "two_phase", "exploit": "solve", "l2": 0},
    "last_layer": {"kind": "last_layer"},
}
LABELS = {
    "base_bn": "base, re-estimated",
    "base_swa": "base, averaged weights",
    "base_temperature": "base, temperature",
    "base_short": "base, equal time",
    "base_long": "base, twice the epochs",
    "dalign": "default",
    "dalign_better": "better",
    "letter": "the letter's method",
    "two_phase_random": "two-phase, random gates",
}


def grid(
    folder: Path,
    *,
    datasets=("digits",),
    augmentations=("none",),
    methods=("base", "base_bn", "two_phase_random"),
    seeds=(0, 1),
    **sections,
) -> Params:
    """Parameters, by way of a file as a profile has one."""
    raw = {
        "profile": "quick",
        "code": ".",
        "grid": {
            "datasets": list(datasets),
            "augmentations": list(augmentations),
            "methods": list(methods),
            "seeds": list(seeds),
        },
        "prepare": {name: {"n_train": 1200, "n_test": 597} for name in datasets},
        "train": {
            name: {
                "model": {"name": "mlp", "units": [64]},
                "epochs": 4,
                "batch_size": 64,
                "recipes": dict.fromkeys(("none", "standard"), "cosine"),
            }
            for name in datasets
        },
        "recipes": {"cosine": {"learning_rate": 0.001, "schedule": "cosine"}},
        "methods": METHODS,
        "labels": LABELS,
        **sections,
    }
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load(path)


def provenance(dataset: str, **changes) -> dict:
    """With what a fabricated run was made."""
    return {
        "dataset": dataset,
        "synthetic": False,
        "partial": False,
        "title": dataset.capitalize(),
        "data_sha256": f"{dataset}0123456789abcdef",
        "source": "an abacus",
        "python": "3.11.9",
        "versions": {"keras": "3.99"},
        "backend": "tensorflow",
        "device": "abacus",
        "threads": 2,
        **changes,
    }


def fabricate(
    layout: Layout,
    run: Run,
    error_rate: float,
    *,
    loss: float | None = None,
    gap: float | None = None,
    seconds: float | None = None,
    commit: str | None = "0123456789abcdef",
    dirty: bool | None = False,
    metrics: dict | None = None,
    **changes,
) -> None:
    """Writes metrics and a timing as if the run had been made."""
    two = not run.method.startswith("base")
    # The solver has no epochs.
    solved = METHODS[run.method].get("exploit") == "solve"
    switch = {
        "epoch": 2,
        "rank": 1200,
        "n": 1200,
        "full": True,
        "complete": True,
        "text": "The rank is full.",
    }
    files.write_json(
        layout.metrics(run),
        {
            "error_rate": error_rate,
            "train_loss": 0.01 * (1 + run.seed) if loss is None else loss,
            "train_error_rate": 0.0,
            "lower_bound": 0.0,
            "gap": 0.02 * (1 + run.seed) if gap is None else gap,
            "l2": 0.0,
            "l2_gap": None,
            "l2_loss": None,
            "parameters": {"base": 100, "total": 150, "exploited": 50},
            "switch": switch if two else None,
            "curves": {
                "epoch": [1, 2] if solved else [1, 2, 3, 4],
                "train_loss": [1.0, 0.5] if solved else [1.0, 0.5, 0.25, 0.125],
                "phase": [0, 0] if solved else [0, 0, int(two), int(two)],
                "test_epoch": [2] if solved else [2, 4],
                "test_error_rate": [0.5] if solved else [0.5, error_rate],
            },
            "provenance": provenance(run.dataset, **changes),
        }
        | (metrics or {}),
    )
    total = 2.0 + run.seed if seconds is None else seconds
    exploit = total / 4 if two else 0.0
    files.write_json(
        layout.timing(run),
        {
            "seconds": total,
            "phases": {
                "explore": total - 2 * exploit,
                "switch": exploit,
                "exploit": exploit,
            },
            "commit": commit,
            "dirty": dirty,
        },
    )
