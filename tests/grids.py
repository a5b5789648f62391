"""Parameters of small grids, for the tests of the pipelines."""

from pathlib import Path

import yaml

TINY = """
profile: tiny
code: .
grid:
  datasets: [digits]
  augmentations: [none, standard]
  methods:
    - base
    - base_bn
    - base_swa
    - dalign
    - letter
    - two_phase_random
    - solve
    - last_layer
  seeds: [0]
prepare:
  digits: {n_train: 150, n_test: 60, split_seed: 0}
train:
  digits:
    model: {name: convnet, filters: [4, 8, 8]}
    epochs: 4
    batch_size: 32
    recipes: {none: cosine, standard: constant}
    checkpoints: [0.5, 1.0]
    augment: {crop: 1, flip: false}
    short: {none: 0.3, standard: 0.75}
recipes:
  constant: {learning_rate: 0.003}
  cosine: {learning_rate: 0.003, schedule: cosine}
methods:
  base: {kind: base}
  base_bn: {kind: base, reestimate: true}
  base_swa: {kind: base, average: true, reestimate: true}
  base_temperature: {kind: base, reestimate: true, temperature: 0.1}
  base_short: {kind: base, epochs: short, reestimate: true}
  base_long: {kind: base, epochs: 2.0, reestimate: true}
  dalign: {kind: two_phase, explore: 0.5, exploit: solve, l2: auto, average: true}
  dalign_better:
    {kind: two_phase, explore: 1.0, exploit: solve, l2: auto, average: true}
  letter: {kind: two_phase, gates: learned, explore: 0.5, exploit: copy}
  two_phase_random: {kind: two_phase, explore: 0.5}
  solve: {kind: two_phase, explore: 0.5, exploit: solve}
  solve_l2: {kind: two_phase, explore: 0.5, exploit: solve, l2: 0.001}
  last_layer: {kind: last_layer, explore: 0.5}
tune: {datasets: [digits], recipes: [constant, cosine], validation: 0.2, seed: 0}
frontier: {datasets: [digits], method: solve, explore: [0.5, 1.0]}
"""


def tiny(path: Path, **changes):
    """Writes parameters of a tiny grid; returns them as they are read."""
    from pipelines.params import load

    raw = yaml.safe_load(TINY)
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load(path)
