"""Products that read only the columns of a weight whose inputs count for a token."""
