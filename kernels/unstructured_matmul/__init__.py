"""Products with weights of values at any places: loaded as a bitmap and values, multiplied as dense tiles."""
