"""Train any Keras model to a certified global minimum of its training loss.

`align` swaps a model's output layer for an `AlignmentHead`. Compiled with
`DAlign`, the resulting `AlignedModel` trains in two phases within one `fit`:

1. *explore*: the user's optimizer trains the whole model, as Keras would, and a running
   average of the weights is kept beside it;
2. *switch*: the weights are set to their average, batch-norm statistics are
   re-estimated over the training data, the head's gates are set, the trunk is frozen;
3. *exploit*: only the head's `q` and `b` are trained. The logits are linear in
   them, so the problem is convex. By default a full-batch solver minimises the loss
   with an L2 term that held-out samples choose, until the gap is certified. Without
   that term the minimum is the global minimum over all parameters of the network.

`solve` does the last two steps for a model that is trained already. `certify` says how
far from the global minimum a model is, at most.

Data flow one way: the subpackages are layers, and import only those above them in this
list.

- `compat`: the private names of Keras that the others rely on;
- `numerics`: functions of arrays that use no model: `losses` (`keras_losses` finds the
  one of a Keras loss, `labels` checks its targets), Gram matrices, subspaces, the
  `rank` check (`rank_check` is its result; `union` is the matroid union that explains a
  failure), the `default_width`, column spaces (by factors, Gram matrices or `lsqr`),
  the `quadratic` model and its relaxation;
- `head`: the `alignment_head` (and `pointwise_dense`, its linear part where that is a
  convolution) with `gate_initialization`, `feature_normalization` and `saved_state`;
  `data` and `streams`, which give batches; `batch_norm`, `features` and the
  `objective`; and the `quadratic_head`, another output layer;
- `solving`: `problem` is the convex problem of a head on kept features, and `products`
  multiply by them (in NumPy, or as `device_products`); `minimum` minimises it, by
  L-BFGS with a `preconditioner` or in `closed_form`; `held_out` samples choose the L2
  weight (`l2_path`) and the `width`; `head_solver` calls these in order, and
  `solve_message` describes the outcome;
- `training`: `surgery` finds the `output_layer` in a `model_graph` and builds an
  `aligned_model`; `feature_map` chooses the input of the gated units. `training_run`
  runs the phases on checked `training_data`, with `dalign` as optimizer, `validation`
  and `run_callbacks`. `switch` goes from one phase to the other, and may set the
  weights to their `weight_average`. `head_summary` adds the phase and the head to
  `model.summary()`;
- `diagnostics`: the conditions of global convergence, measured on any model.
  `precision` makes float64 copies, `engines` differentiate them on each backend,
  `jacobian` multiplies by the result (`jacobian_builder` chooses the kind);
  `tangent_kernel`, `structure`, `alignment` and `gradient_bound` use it;
- `certification`: `certify`, `forecast` and `solver` take models and data as users have
  them, and return a `certificate`, a `forecast_result` or a solve result; `model_card`
  writes a certificate as a card for a model hub;
  `quadratic_bound` and `quadratic_solver` are for the quadratic head; `monitor` logs
  the conditions during training.

Outside the layers are `models` (residual networks) and `parametrization`, which makes
a new model's width scale by muP or another parametrisation (`growth` has the rules for
each layer).
"""

from importlib.metadata import version

from keras_dalign import models
from keras_dalign.certification.certificate import Certificate
from keras_dalign.certification.certify import certify
from keras_dalign.certification.forecast import forecast
from keras_dalign.certification.forecast_result import Forecast
from keras_dalign.certification.monitor import AlignmentMonitor
from keras_dalign.certification.quadratic_bound import QuadraticBound
from keras_dalign.certification.quadratic_solver import (
    QuadraticSolveResult,
    solve_quadratic,
)
from keras_dalign.certification.solver import SolveResult, solve
from keras_dalign.diagnostics.alignment import check_alignment
from keras_dalign.diagnostics.alignment_report import AlignmentReport
from keras_dalign.diagnostics.jacobian import Jacobian
from keras_dalign.diagnostics.jacobian_builder import jacobian
from keras_dalign.diagnostics.structure import check_structure
from keras_dalign.diagnostics.structure_report import StructureReport
from keras_dalign.diagnostics.tangent_kernel import tangent_kernel
from keras_dalign.head.alignment_head import AlignmentHead
from keras_dalign.head.batch_norm import reestimate_batch_norm
from keras_dalign.head.quadratic_head import QuadraticHead
from keras_dalign.parametrization import parametrize
from keras_dalign.training.aligned_model import AlignedModel
from keras_dalign.training.dalign import DAlign
from keras_dalign.training.surgery import align

__version__ = version("keras-dalign")

__all__ = [
    "AlignedModel",
    "AlignmentHead",
    "AlignmentMonitor",
    "AlignmentReport",
    "Certificate",
    "DAlign",
    "Forecast",
    "Jacobian",
    "QuadraticBound",
    "QuadraticHead",
    "QuadraticSolveResult",
    "SolveResult",
    "StructureReport",
    "align",
    "certify",
    "check_alignment",
    "check_structure",
    "forecast",
    "jacobian",
    "models",
    "parametrize",
    "reestimate_batch_norm",
    "solve",
    "solve_quadratic",
    "tangent_kernel",
]
