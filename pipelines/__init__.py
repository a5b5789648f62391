"""The experiments: data sets x augmentations x methods x seeds, from data to a page.

Stages, each a module with a `main` to import, and a command `python pipelines STAGE`:

1. `prepare`: loads, verifies and splits a data set and writes `data/NAME.npz`;
2. `explore`: trains the base model of a seed, whose weights methods go on from;
3. `train`: finishes a run of a data set, an augmentation, a method and a seed;
4. `evaluate`: test error, calibration, training loss and gap of a run, into
   `results/metrics/`;
5. `report`: tables, figures, verdict and page of all runs, into `results/`.

In addition, `tune` looks for the base model's best recipe on held-out training samples,
and `frontier` measures error and time against the share that is explored.

`readme` writes the results into the README, and `gate` checks that they belong to the
code. `reproduce` compares fresh results with the committed ones. `resume` runs what is
left of a profile, also in a clone that has neither data nor runs. `rerun` runs all of
it again in one process, and records it with DVC.

`dvc repro` runs the stages as dvc.yaml says, `python -m pipelines.quickstart` in one
process and without DVC. Both run the grid of a params.yaml: the root's is the profile
`quick`, and `profiles/` has larger ones; `profiles/README.md` says how to run them.
Pipelines use only public names of `keras_dalign`, except for its average of the
weights.

How to extend the grid:

- a **data set** is an entry of `datasets.KNOWN`, a section under `prepare` and one
  under `train` in params.yaml, and its name in `grid.datasets`; another name for one
  that is there (`source`) trains another model on it;
- a **model** is a function in `base_models.BUILDERS`, and named under `train`;
- a **method** is a section under `methods`, and its name in `grid.methods`; one of a
  new kind is a function in `methods.KINDS`, too.
"""

import logging
import os

# TensorFlow reads it when it is imported: warnings and errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Each run compiles functions of its own, about which TensorFlow would warn.
logging.getLogger("tensorflow").setLevel(logging.ERROR)
