"""The environment of a run: versions, device, threads."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import keras


def environment() -> dict[str, Any]:
    """Versions, backend, device and threads of this process.

    Two runs with the same environment, data and parameters on a CPU have the same
    results; with another number of threads, they agree up to rounding.

    Returns:
        The environment, ready for JSON.
    """
    backend = keras.backend.backend()
    packages = ("keras-dalign", "keras", backend, "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "backend": backend,
        "device": _device(backend),
        "threads": _threads(),
    }


def _version(name: str) -> str | None:
    # TensorFlow and PyTorch have several distributions of one package.
    for candidate in (name, f"{name}-cpu"):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device(backend: str) -> str:
    if backend == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        for gpu in tf.config.list_physical_devices("GPU"):
            details = tf.config.experimental.get_device_details(gpu)
            return str(details.get("device_name", gpu.name))
    elif backend == "jax":
        import jax  # noqa: PLC0415

        if jax.default_backend() != "cpu":
            return str(jax.devices()[0].device_kind)
    elif backend == "torch":
        import torch  # noqa: PLC0415

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name())
    return _cpu()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
