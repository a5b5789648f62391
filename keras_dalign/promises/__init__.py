"""Layer 6. What can be promised: certificates, forecasts, solutions, curves."""
