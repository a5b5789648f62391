"""A model card: what a hub of models shows of a certified model."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_dalign.numerics.arguments import keras_model
from keras_dalign.numerics.rounding import rounded

if TYPE_CHECKING:
    from keras_dalign.certification.certificate import Certificate

_CARD = """\
---
library_name: keras
tags:
- keras
- keras_dalign
---

# {name}

{certificate}

| certificate | |
|---|---|
{rows}

The gap bounds the distance from the training loss to its global minimum, over all
functions of the inputs. It says nothing about the loss on other data.

## Check it

Load the model, and certify it on the same data. The digest says whether they are the
same: it does not depend on their order.

```python
import keras
import keras_dalign

model = keras.saving.load_model("hf://...")
certificate = keras_dalign.certify(model, x, y{arguments})
assert certificate.data_digest == "{digest}"
print(certificate)
```

## Versions

| | |
|---|---|
{versions}
"""


def model_card(certificate: Certificate, model: keras.Model) -> str:
    """Writes the card; see `Certificate.model_card`."""
    keras_model(model)
    parameters = f"{model.count_params():,}" if model.built else "not built"
    rows = {
        "objective": certificate.objective,
        "loss": f"{certificate.loss:.6g}",
        "lower bound of the loss": rounded(certificate.lower_bound, up=False),
        "gap, at most": rounded(certificate.gap, up=True),
    }
    if certificate.l2_loss is not None and certificate.l2_gap is not None:
        rows[f"loss with l2={certificate.l2:g}"] = f"{certificate.l2_loss:.6g}"
        rows["its gap, at most"] = rounded(certificate.l2_gap, up=True)
    rows |= {
        "samples": f"{certificate.n_samples:,}",
        "distinct inputs": f"{certificate.n_distinct:,}",
        "of them with conflicting targets": f"{certificate.n_conflicts:,}",
        "digest of the samples": f"`{certificate.data_digest}`",
        "outputs in": certificate.dtype,
        "parameters of the model": parameters,
    }
    backend = keras.backend.backend()
    versions = {
        "keras_dalign": version("keras-dalign"),
        "Keras": keras.version(),
        f"backend: {backend}": _backend_version(backend),
        "NumPy": np.__version__,
        "Python": platform.python_version(),
    }
    return _CARD.format(
        name=model.name,
        certificate=certificate,
        rows=_table(rows),
        arguments="" if certificate.l2 is None else f", l2={certificate.l2!r}",
        digest=certificate.data_digest,
        versions=_table(versions),
    )


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _backend_version(backend: str) -> str:
    """The version of TensorFlow, JAX or PyTorch."""
    return str(sys.modules[backend].__version__)
