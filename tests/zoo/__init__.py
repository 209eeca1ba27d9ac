"""The zoo: tiny random instances of real architectures, made by one generator from transformers' configuration classes.

>>> from tests import zoo
>>> model, args, kwargs = zoo.build("qwen3_moe")  # doctest: +SKIP
"""

from tests.zoo.generator import Unbuildable, build, families, names, vary

__all__ = ["Unbuildable", "build", "families", "names", "vary"]
