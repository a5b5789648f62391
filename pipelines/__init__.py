"""The experiments: data sets x methods x seeds, from raw data to a table.

Four stages, each a module with a `main` to import and a command line:

1. `prepare`: reads, splits and checks a data set and writes `data/NAME.npz`;
2. `train`: one run of a data set, a method and a seed, into `runs/`;
3. `evaluate`: test error, training loss and gap of a run, into `results/metrics/`;
4. `report`: the table, the figure and the summary of all runs, into `results/`.

`dvc repro` runs them as dvc.yaml says, `python -m pipelines.quickstart` in one
process. Both run the grid of params.yaml. Pipelines use the public names of
`keras_dalign` only.

How to extend the grid:

- a **data set** is a function in `datasets.LOADERS`, a section under `prepare` and
  one under `train` in params.yaml, and its name in `grid.datasets`. This is the place
  of the benchmark on six data sets (MNIST, CIFAR-10, CIFAR-100, KMNIST, SVHN and
  Semeion), whose residual networks are a function in `base_models.BUILDERS`;
- a **method** is a section under `methods`, and its name in `grid.methods`; one of a
  new kind is a function in `methods.KINDS`, too.
"""

import logging
import os

# TensorFlow reads it when it is imported: warnings and errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Each run compiles functions of its own, about which TensorFlow would warn.
logging.getLogger("tensorflow").setLevel(logging.ERROR)
