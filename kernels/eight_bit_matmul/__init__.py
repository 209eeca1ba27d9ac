"""Products in which both sides have eight bits."""
