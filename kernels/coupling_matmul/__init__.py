"""Products that couple groups of features, each feature with its like in the other groups: the inner factor of BLAST."""
