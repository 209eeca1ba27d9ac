"""What rotary position embeddings look like."""

from recast.patterns.rotary.rotate import RULES

__all__ = ["RULES"]
