"""Layer 5. The two conditions of global convergence, measured on any model."""
