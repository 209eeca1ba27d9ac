"""Products with a block-diagonal matrix."""
