"""Studies of the mechanism: when is a network aligned with its data, and what follows?

Each study is a module with a `run(settings)` that returns rows of plain values, and a
`draw(axes, rows)` for its figure. `pipelines.study` runs one of them as a DVC stage,
with its section of `studies` in params.yaml; `pipelines.study_report` draws them all.
To add one: a module here, and a section in params.yaml.
"""
