"""Layer 1. Losses, Gram matrices, subspaces and ranks: functions of arrays.

No module here uses a model. The types of arrays that the package shares are here.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
