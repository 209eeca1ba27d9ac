"""Capture: a model in, a `Program` out, through `torch.export` or from a `torch.compile` graph."""
