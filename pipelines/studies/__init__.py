"""Studies: when does a network that learns its features reach a global minimum?

Each study is a package with

- `TITLE`, and `PANELS`: how many its figure has;
- `cells(settings)`: the independent pieces of work, as dicts of plain values, with a
  seed in each. A killed study continues with the cells that are missing;
- `measure(settings, cell)`: computes one, and returns rows of plain values that repeat
  the cell's;
- `draw(axes, rows)`: the figure;
- `claims(rows, settings)`: its claims with their numbers, as `claims.Claim`.

`pipelines.study` runs one of them as a DVC stage, with its section of `studies` in
profiles/studies/params.yaml. `pipelines.study_report` draws them all, and writes the
verdicts of all claims. `docs/studies` has a page for each. To add one: a package here,
a section in the parameters, and a page.
"""
