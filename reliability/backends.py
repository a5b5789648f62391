"""Children on Keras's backends, which may need an environment each."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
_THREADS = ("OMP", "OPENBLAS", "MKL", "TF_NUM_INTRAOP", "TF_NUM_INTEROP")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--python BACKEND=PATH`."""
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="BACKEND=PATH",
        help="interpreter that has the backend; by default this one, for each backend "
        "that it can import",
    )


def pythons(given: list[str]) -> dict[str, str]:
    """The interpreter of each backend.

    Args:
        given: Values of `--python`.

    Returns:
        Paths by backend.

    Raises:
        ValueError: If there is no such backend.
    """
    found = dict(each.split("=", 1) for each in given)
    if unknown := set(found) - set(MODULES):
        raise ValueError(
            f"`--python` takes BACKEND=PATH with a backend of {', '.join(MODULES)}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    if found:
        return found
    code = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('{}'))"
    return {
        backend: sys.executable
        for backend, module in MODULES.items()
        if not subprocess.run(
            [sys.executable, "-c", code.format(module)], check=False
        ).returncode
    }


def run(
    module: str,
    task: Mapping[str, Any],
    backend: str,
    python: str,
    threads: int = 1,
    timeout: float = 1800,
    path: str = "",
) -> Any:
    """Runs `module.child(task)` in a new process on a backend.

    Args:
        module: Name of a module that calls `serve(child)` if it is the main one.
        task: The argument, which `json.dumps` takes.
        backend: The backend.
        python: Its interpreter.
        threads: Threads that the libraries may use.
        timeout: Seconds to wait.
        path: Another folder of modules.

    Returns:
        What `child` returned.

    Raises:
        RuntimeError: If the process fails.
    """
    environment = {
        **os.environ,
        **{f"{name}_NUM_THREADS": str(threads) for name in _THREADS[:3]},
        **{f"{name}_THREADS": str(threads) for name in _THREADS[3:]},
        # PyTorch and JAX read it; TensorFlow's eigen pool reads the two above.
        "XLA_FLAGS": (
            f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
        ).strip(),
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
        "PYTHONHASHSEED": "0",
    }
    made = subprocess.run(
        [python, "-m", module],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        check=False,
    )
    if made.returncode:
        raise RuntimeError(
            f"The child on {backend} failed. Received: code {made.returncode}: "
            f"{made.stderr[-2000:]}"
        )
    return json.loads(made.stdout.splitlines()[-1])


def serve(child: Callable[[Mapping[str, Any]], Any]) -> None:
    """Does the task that stands in the standard input, and prints what it gives."""
    print(json.dumps(child(json.load(sys.stdin))))
