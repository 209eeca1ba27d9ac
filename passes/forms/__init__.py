"""Weight forms: what is asked for (`Form`), what is held (`Operator`), and the fitting between them."""

from recast.passes.forms.algebra import DirectSum, Product, RowStack, Sum
from recast.passes.forms.block_diagonal import BlockDiagonal, BlockDiagonalForm
from recast.passes.forms.composite import PipeForm, ProductForm, SumForm
from recast.passes.forms.dense import DenseForm
from recast.passes.forms.form import Form, NamedForm, Parameter
from recast.passes.forms.int4 import Int4
from recast.passes.forms.int8 import Int8
from recast.passes.forms.low_rank import LowRank
from recast.passes.forms.operator import Cost, Dense, Operator
from recast.passes.forms.quantized import Quantized
from recast.passes.forms.registry import form_named, forms
from recast.passes.forms.stats import Stats, relative_error

__all__ = [
    "BlockDiagonal",
    "BlockDiagonalForm",
    "Cost",
    "Dense",
    "DenseForm",
    "DirectSum",
    "Form",
    "Int4",
    "Int8",
    "LowRank",
    "NamedForm",
    "Operator",
    "Parameter",
    "PipeForm",
    "Product",
    "ProductForm",
    "Quantized",
    "RowStack",
    "Stats",
    "Sum",
    "SumForm",
    "form_named",
    "forms",
    "relative_error",
]
