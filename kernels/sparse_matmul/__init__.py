"""Products with sparse weights: N of every M inputs, or any places marked in a bitmap."""
