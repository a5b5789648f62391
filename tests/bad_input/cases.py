"""All cases."""

from bad_input.certification import CERTIFICATION
from bad_input.diagnostics import DIAGNOSTICS
from bad_input.fit import FIT
from bad_input.head import HEAD
from bad_input.held_out_data import HELD_OUT
from bad_input.model_parts import MODEL_PARTS
from bad_input.models_and_losses import LOSSES, MODELS
from bad_input.optimizer import OPTIMIZER
from bad_input.solver import SOLVER
from bad_input.training_data import INPUTS, LABELS, WEIGHTS

CASES = [
    *INPUTS,
    *LABELS,
    *WEIGHTS,
    *MODELS,
    *LOSSES,
    *HEAD,
    *OPTIMIZER,
    *SOLVER,
    *CERTIFICATION,
    *DIAGNOSTICS,
    *MODEL_PARTS,
    *HELD_OUT,
    *FIT,
]
