"""What normalisations look like: as one operation of torch, and written out."""

from recast.patterns.norm import layer, operations, rms

__all__ = ["RULES"]

RULES = (*operations.RULES, *layer.RULES, *rms.RULES)
