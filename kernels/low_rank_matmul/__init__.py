"""Products with two thin matrices, one after the other."""
