"""Linear in every spelling: what it looks like in the graph, and what is packed in one weight."""
