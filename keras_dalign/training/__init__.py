"""Layer 4. Two-phase training: surgery, the model, the optimizer, the switch."""
