"""Layer 1. Losses, Gram matrices, subspaces, ranks: arrays, and no model."""
