"""What each lever of the default is worth, alone and together, on the same trunks.

For each data set of the profile `cpu`, with and without augmentation, and each seed,
three trunks are trained: with the profile's recipe, with a recipe that ends with
exploration, and on nine tenths of the samples. Each entry of `VARIANTS` starts from one
of these trunks and changes one lever of the default. Variants are compared with the
default in pairs.

`python -m benchmarks.levers` measures them. Trunks and results are kept in `--cache`,
so a run that was killed continues from there. Empty it after a change of the package.
"""
