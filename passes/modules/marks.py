"""Marks on values of a program with smaller blocks, in ``node.meta``, that verification reads."""

BLOCK = "recast_block"  # name of the block that a value is part of
END = "recast_block_end"  # name of the value that it stands for in the program as it was
