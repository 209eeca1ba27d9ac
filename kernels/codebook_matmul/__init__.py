"""Products with weights that are kept as places in a table."""
