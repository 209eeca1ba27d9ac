"""What normalisations look like: as one operation of torch, and written out."""

from recast.patterns.norm import frozen, layer, operations, rms

__all__ = ["RULES"]

RULES = (*operations.RULES, *frozen.RULES, *layer.RULES, *rms.RULES)
