"""Products with a matrix whose values stand at the bits set in a bitmap."""
