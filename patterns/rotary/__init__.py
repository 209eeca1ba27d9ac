"""What rotary position embeddings look like."""

from recast.patterns.rotary import rotate, unjoined

__all__ = ["RULES"]

RULES = (*rotate.RULES, *unjoined.RULES)
