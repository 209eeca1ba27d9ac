"""Products with a 2:4 matrix between two block-diagonal ones."""
