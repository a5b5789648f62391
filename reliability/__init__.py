"""Measures how reliable the package is: `python -m reliability NAME [options]`.

One module a measurement, `reliability/NAME.py`. Each has

- a docstring: the first line says what is measured;
- `add_options(parser)`: adds its options, with the full measurement as default;
- `measure(options) -> Report`: does it, and returns figures beside their targets.

`__main__` runs them, writes `results/NAME.md` and `results/NAME.json` with date, commit
and machine, and fills the table of `docs/reliability.md`. A small version of each runs
among the tests.
"""
