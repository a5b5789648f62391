"""The command line: certifies, solves and checks saved models on saved data.

    python -m keras_dalign certify model.keras data.npz
    python -m keras_dalign solve model.keras data.npz --out better.keras
    python -m keras_dalign check model.keras data.npz

Exit codes: 0 if the answer is yes (the gap is at most `--tol`; converged; structure and
alignment hold), 1 if it is no, 2 for wrong arguments, files or data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign
from keras_dalign.numerics.rounding import rounded

LOSSES = ("softmax", "binary", "mse")


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: The command line without the program's name; `sys.argv` by default.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(words)
    try:
        code, text, record = options.run(options)
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"keras_dalign {options.command}: error: {error}\n")
        return 2
    if options.json:
        text = json.dumps(_finite(record), indent=1, allow_nan=False)
    sys.stdout.write(f"{text}\n")
    return code


def _certify(options: argparse.Namespace) -> tuple[int, str, dict[str, Any]]:
    model, x, y = _inputs(options)
    loss = _loss(options.loss, y)
    certificate = keras_dalign.certify(
        model, x, y, loss=loss, l2=options.l2, batch_size=options.batch_size
    )
    gap = certificate.gap if certificate.l2_gap is None else certificate.l2_gap
    text, reached = str(certificate), options.tol is None or gap <= options.tol
    if not reached:
        text += f"\nThe gap, {rounded(gap, up=True)}, is above --tol {options.tol:g}."
    return int(not reached), text, certificate.to_dict()


def _solve(options: argparse.Namespace) -> tuple[int, str, dict[str, Any]]:
    _check_output(options.out, options.force)
    model, x, y = _inputs(options)
    loss = _loss(options.loss, y)
    validation = options.validation and _arrays(options, options.validation)
    if not isinstance(model, keras_dalign.AlignedModel):
        model = keras_dalign.align(
            model, n_samples=len(x), width=options.width, seed=options.seed
        )
    elif options.width is not None:
        raise ValueError(
            "--width is chosen when a model is aligned. Received: "
            f"--width {options.width} for {options.model}, which is aligned already. "
            "Leave it out."
        )
    result = keras_dalign.solve(
        model,
        x,
        y,
        loss=loss,
        l2=options.l2,
        tol=options.tol,
        max_iterations=options.max_iterations,
        validation_data=validation or None,
        batch_size=options.batch_size,
        verbose=0,
    )
    model.save(options.out)
    text = f"{result}\nSaved as {options.out}."
    return int(not result.converged), text, result.to_dict()


def _check(options: argparse.Namespace) -> tuple[int, str, dict[str, Any]]:
    model, x, y = _inputs(options)
    loss = _loss(options.loss, y)
    structure = keras_dalign.check_structure(
        model, x[: options.batch_size], parameters=options.parameters
    )
    alignment = keras_dalign.check_alignment(
        model,
        x,
        y,
        loss=loss,
        parameters=options.parameters,
        batch_size=options.batch_size,
    )
    record = {"structure": structure.to_dict(), "alignment": alignment.to_dict()}
    holds = structure.holds and alignment.aligned
    return int(not holds), f"{structure}\n{alignment}", record


def _inputs(options: argparse.Namespace) -> tuple[keras.Model, Any, Any]:
    """The model, and the arrays of inputs and targets."""
    # Keras says of a missing file that its format is wrong.
    if not Path(options.model).is_file():
        raise ValueError(f"There is no file {options.model}.")
    model = keras.models.load_model(options.model)
    return model, *_arrays(options, options.data)


def _arrays(options: argparse.Namespace, path: str) -> tuple[Any, Any]:
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file. Make one with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in (options.x, options.y) if name not in arrays]
            if missing:
                raise ValueError(
                    f"{path} has no array {' and no array '.join(missing)}. It has: "
                    f"{', '.join(arrays.files)}. Name others by --x and --y."
                )
            return arrays[options.x], arrays[options.y]
    except (AttributeError, EOFError) as error:
        raise ValueError(f"{path} is not an .npz file of NumPy: {error}") from error


def _loss(name: str | None, y: Any) -> keras.Loss | None:
    """The loss of a name; None for the one that the model was compiled with."""
    if name == "softmax":
        if np.ndim(y) == 2 and np.shape(y)[1] > 1:
            return keras.losses.CategoricalCrossentropy(from_logits=True)
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "binary":
        return keras.losses.BinaryCrossentropy(from_logits=True)
    if name == "mse":
        return keras.losses.MeanSquaredError()
    return None


def _check_output(path: str, force: bool) -> None:
    """Checks that the result can be saved, before anything is computed.

    Raises:
        ValueError: If the file exists, or cannot be written.
    """
    if not path.endswith(".keras"):
        raise ValueError(f"--out must end in .keras. Received: {path}")
    if Path(path).exists() and not force:
        raise ValueError(f"--out: {path} exists. Pass --force to replace it.")
    folder = Path(path).absolute().parent
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: the folder {folder} is not there, or is read-only.")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _l2(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_dalign",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").rpartition("\n\n")[2],
    )
    version = f"keras_dalign {keras_dalign.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("model", help="a model saved as .keras")
    shared.add_argument("data", help="an .npz file with inputs and targets")
    shared.add_argument("--x", default="x", help="name of the inputs (x)")
    shared.add_argument("--y", default="y", help="name of the targets (y)")
    shared.add_argument(
        "--loss",
        choices=LOSSES,
        help="of logits: softmax or binary cross-entropy, or mean squared error; by "
        "default the loss that the model was compiled with",
    )
    shared.add_argument("--batch-size", type=int, default=256)
    shared.add_argument("--json", action="store_true", help="write JSON")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, parents=[shared]
        )
        command.set_defaults(run=run)
        return command

    command = add("certify", _certify, "bounds the distance to the global minimum")
    command.add_argument("--l2", type=float, help="certify with this L2 weight, too")
    command.add_argument("--tol", type=float, help="exit with 1 above this gap")

    command = add("solve", _solve, "trains the last layer to its global minimum")
    command.add_argument("--out", required=True, help="where to save, as .keras")
    command.add_argument("--force", action="store_true", help="replace that file")
    command.add_argument("--l2", type=_l2, default="auto", help="a weight, or auto")
    command.add_argument("--width", type=int, help="gated units per output")
    command.add_argument("--tol", type=float, default=1e-6, help="the gap to reach")
    command.add_argument("--max-iterations", type=int, default=1000)
    command.add_argument("--seed", type=int, default=0, help="of the gates")
    command.add_argument(
        "--validation", help="an .npz file that chooses L2 weight and width"
    )

    command = add("check", _check, "checks common model structure and alignment")
    command.add_argument(
        "--parameters",
        choices=("head", "last", "all"),
        help="default: the head of an aligned model that exploits, else the last layer",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
