"""Layer 2. The alignment head, and the features and data that it works on."""
