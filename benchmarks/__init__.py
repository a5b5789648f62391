"""The figures that the package must show, each a program that measures them.

Run `python -m benchmarks.NAME` from the repository's root. README.md has the list. The
programs are not tests: they take minutes, and they measure time.
"""

import os

# TensorFlow reads it when it is imported: warnings and errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
