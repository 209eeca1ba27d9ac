"""Products with 2:4 weights whose kept values are codes."""
