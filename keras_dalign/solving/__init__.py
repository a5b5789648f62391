"""Layer 3. The convex problem of a head on kept features, and its solvers."""
