"""Products with a linear combination of matrices whose numbers are codes."""
