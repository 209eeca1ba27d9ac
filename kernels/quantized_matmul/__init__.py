"""Matrix products with integer weights."""
