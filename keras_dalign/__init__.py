"""Train any Keras model to a certified global minimum of its training loss.

`align` swaps a model's output layer for an `AlignmentHead`. Compiled with
`DAlign`, the resulting `AlignedModel` trains in two phases within one `fit`:

1. *explore*: the user's optimizer trains the whole model, as Keras would;
2. *switch*: batch-norm statistics are re-estimated over the training data, the
   head's gates are set, the trunk is frozen, the rank is checked;
3. *exploit*: only the head's `q` and `b` are trained. The logits are linear in
   them, so the problem is convex, and its minimum is the global minimum over all
   parameters of the network.

`certify` says how far from that minimum the model is, at most.

Data flow one way: `surgery` builds an `aligned_model` from a trunk and an
`alignment_head`; `training_run` drives its phases with `dalign` as optimizer;
`switch` stands between the phases and uses `batch_norm`, `features` and `rank`;
`certificate` looks at the result with `losses`. `data` is how all of them read
arrays and streams.
"""

from importlib.metadata import version

from keras_dalign import models
from keras_dalign.aligned_model import AlignedModel
from keras_dalign.alignment_head import AlignmentHead
from keras_dalign.batch_norm import reestimate_batch_norm
from keras_dalign.certificate import Certificate, certify
from keras_dalign.dalign import DAlign
from keras_dalign.surgery import align

__version__ = version("keras-dalign")

__all__ = [
    "AlignedModel",
    "AlignmentHead",
    "Certificate",
    "DAlign",
    "align",
    "certify",
    "models",
    "reestimate_batch_norm",
]
