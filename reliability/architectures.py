"""Models of `keras.applications` and of KerasHub: aligned, solved, saved and loaded.

One model of each family of `keras.applications`, the smallest, and KerasHub's
classifiers on backbones that are built from small configurations. Weights are random:
nothing is downloaded. Each model is aligned; its outputs must stay the same bit by
bit. Then its head is solved for random labels on 16 samples, certified, saved and
loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import importlib.util
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dalign as kd
from benchmarks.common import Target, table
from reliability.report import Report

CLASSES = 10
SAMPLES = 16
TOLERANCE = 1e-6
L2 = 1e-2
# Gives a model and its inputs.
Build = Callable[[], tuple[keras.Model, Any]]

# Tokens in a text, and how many there are.
_LENGTH, _TOKENS = 16, 100

# The smallest model of each family, and the least side of its images.
APPLICATIONS = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "Xception": 71,
}

# KerasHub's classifiers of images, and the arguments of their backbones.
IMAGE_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "CSPNet": {
        "stem_filters": 16,
        "stem_kernel_size": 3,
        "stem_strides": 2,
        "stackwise_depth": [1, 1],
        "stackwise_strides": [1, 2],
        "stackwise_num_filters": [16, 32],
        "stage_type": "dark",
        "block_type": "dark_block",
    },
    "DenseNet": {
        "stackwise_num_repeats": [2, 2],
        "stem_filters": 16,
        "growth_rate": 8,
    },
    "MiT": {
        "image_shape": (32, 32, 3),
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "hidden_dims": [16, 32],
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [4, 2],
        "max_drop_path_rate": 0.0,
        "layerwise_patch_sizes": [7, 3],
        "layerwise_strides": [4, 2],
    },
    "ResNet": {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [3],
        "stackwise_num_filters": [64, 64],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_strides": [1, 2],
        "block_type": "basic_block",
    },
    "ViT": {
        "image_shape": (32, 32, 3),
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
    },
}

# KerasHub's classifiers of texts, and further arguments of their backbones.
TEXT_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_dim": 16},
    "Bert": {},
    "DebertaV3": {"bucket_size": 8},
    "DistilBert": {},
    "FNet": {},
    "Roberta": {},
    "XLMRoberta": {},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What was seen of one model.

    Attributes:
        model: Its name.
        parameters: Number of parameters.
        output_layer: The layer that became the linear part of the head.
        features: Length of the features; in a pair the second feeds the gated units.
        unchanged: Whether the aligned model has the base's outputs, bit by bit.
        gap: Certified gap of the loss with its L2 term.
        reloaded: Whether the loaded model has the outputs of the saved one.
        error: What went wrong, if anything did.
        seconds: Wall time.
    """

    model: str
    parameters: int = 0
    output_layer: str = ""
    features: str = ""
    unchanged: bool = False
    gap: float = np.inf
    reloaded: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether everything holds."""
        whole = self.unchanged and self.reloaded and not self.error
        return bool(whole and self.gap <= TOLERANCE)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of models")


def models() -> dict[str, Build]:
    """What builds each model and its inputs; KerasHub's are left out without it."""
    found: dict[str, Build] = {
        name: functools.partial(_application, name, side)
        for name, side in APPLICATIONS.items()
    }
    if importlib.util.find_spec("keras_hub") is not None:
        for name in IMAGE_CLASSIFIERS:
            found[f"KerasHub {name}"] = functools.partial(_image_classifier, name)
        for name in TEXT_CLASSIFIERS:
            found[f"KerasHub {name}"] = functools.partial(_text_classifier, name)
    return found


def _images(side: int) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .uniform(0, 255, (SAMPLES, side, side, 3))
        .astype("float32")
    )


def _application(name: str, side: int) -> tuple[keras.Model, Any]:
    build = getattr(keras.applications, name)
    model = build(
        weights=None,
        classes=CLASSES,
        input_shape=(side, side, 3),
        classifier_activation=None,
    )
    return model, _images(side)


def _keras_hub() -> Any:
    return importlib.import_module("keras_hub")


def _image_classifier(name: str) -> tuple[keras.Model, Any]:
    hub = _keras_hub()
    options = {"image_shape": (None, None, 3), **IMAGE_CLASSIFIERS[name]}
    backbone = getattr(hub.models, f"{name}Backbone")(**options)
    classifier = getattr(hub.models, f"{name}ImageClassifier")
    return classifier(backbone=backbone, num_classes=CLASSES), _images(32)


def _text_classifier(name: str) -> tuple[keras.Model, Any]:
    hub = _keras_hub()
    options = {
        "vocabulary_size": _TOKENS,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "max_sequence_length": _LENGTH,
        **TEXT_CLASSIFIERS[name],
    }
    if name == "FNet":
        del options["num_heads"]
    backbone = getattr(hub.models, f"{name}Backbone")(**options)
    classifier = getattr(hub.models, f"{name}TextClassifier")
    rng = np.random.default_rng(0)
    inputs = {
        "token_ids": rng.integers(1, _TOKENS, (SAMPLES, _LENGTH)).astype("int32"),
        "segment_ids": np.zeros((SAMPLES, _LENGTH), "int32"),
        "padding_mask": np.ones((SAMPLES, _LENGTH), "int32"),
    }
    model = classifier(backbone=backbone, num_classes=CLASSES)
    return model, {name: inputs[name] for name in model.input}


def tried(name: str, build: Build, folder: Path) -> Row:
    """Aligns, solves, certifies, saves and loads one model.

    Args:
        name: Its name.
        build: Gives the model and its inputs.
        folder: For the file.

    Returns:
        What was seen.
    """
    start = time.perf_counter()
    row = Row(name)
    try:
        keras.utils.set_random_seed(0)
        base, x = build()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        y = np.random.default_rng(1).integers(0, CLASSES, SAMPLES)
        base.compile(loss=loss)
        before = base.predict_on_batch(x)
        model = kd.align(base, n_samples=SAMPLES, seed=0)
        dense = model.head.dense
        shape = model.trunk.output_shape
        shapes = shape if isinstance(shape, list) else [shape]
        row = dataclasses.replace(
            row,
            parameters=base.count_params(),
            output_layer=getattr(dense, "convolution", dense).name,
            features=" and ".join(
                " x ".join(str(side) for side in each[1:]) for each in shapes
            ),
            unchanged=np.array_equal(model.predict_on_batch(x), before),
        )
        kd.solve(model, x, y, loss=loss, l2=L2, tol=TOLERANCE, verbose=0)
        certificate = kd.certify(model, x, y, loss=loss, l2=L2)
        row = dataclasses.replace(row, gap=float(certificate.l2_gap or 0.0))
        path = folder / "model.keras"
        model.save(path)
        expected = model.predict_on_batch(x)
        found = keras.saving.load_model(path).predict_on_batch(x)
        row = dataclasses.replace(row, reloaded=np.array_equal(found, expected))
    except Exception as error:  # noqa: BLE001 (what fails is a row of the table)
        traceback.print_exc()
        text = str(error).partition("\n")[0]
        row = dataclasses.replace(row, error=f"{type(error).__name__}: {text}")
    return dataclasses.replace(row, seconds=time.perf_counter() - start)


def measure(options: argparse.Namespace) -> Report:
    """Tries all models.

    Args:
        options: From `add_options`.

    Returns:
        The report.

    Raises:
        ValueError: If a name is not that of a model.
    """
    every = models()
    names = options.only or list(every)
    unknown = sorted(set(names) - set(every))
    if unknown:
        raise ValueError(
            f"There are no models {', '.join(unknown)}. There are: {', '.join(every)}"
        )
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(name, every[name], Path(folder)))
        print(rows[-1], flush=True)
        keras.utils.clear_session(free_memory=False)
        gc.collect()
    return report(rows, names)


def report(rows: list[Row], names: list[str]) -> Report:
    """The table, and the targets."""
    wrong = sum(not row.right for row in rows)
    backend = keras.backend.backend()
    made = [keras.version(), f"backend {backend}"]
    if any(name.startswith("KerasHub") for name in names):
        made.append(f"KerasHub {_keras_hub().__version__}")
    return Report(
        title="Architectures: what aligns",
        body=[
            (
                f"Keras {', '.join(made)}; random weights, {CLASSES} classes. Each "
                "model was aligned, its head solved for random labels of "
                f"{SAMPLES} samples (l2={L2:g}), certified, saved and loaded."
            ),
            architectures_table(rows),
        ],
        targets=[
            Target("models", len(rows), len(APPLICATIONS), at_least=True),
            Target("models for which something failed", wrong, 0),
        ],
        settings={"backend": backend, "names": names},
        measurements=[dataclasses.asdict(row) for row in rows],
    )


def architectures_table(rows: list[Row]) -> str:
    """One row per model."""
    header = [
        "model",
        "parameters",
        "output layer",
        "features",
        "same outputs",
        "certified gap",
        "same after loading",
    ]
    return table(
        header,
        [
            [
                row.model,
                f"{row.parameters:,}",
                f"`{row.output_layer}`",
                row.features,
                _sign(row.unchanged),
                f"{row.gap:.1e}",
                row.error or _sign(row.reloaded),
            ]
            for row in rows
        ],
    )


def _sign(holds: bool) -> str:
    return "yes" if holds else "**no**"
