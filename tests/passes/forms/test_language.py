import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recast.passes.forms import (
    BlockDiagonalForm,
    DenseForm,
    Form,
    Int4,
    Int8,
    LowRank,
    PipeForm,
    ProductForm,
    SumForm,
    form_named,
    forms,
)
from recast.patterns.errors import FormError

whole = st.integers(1, 10**6)
leaves = st.one_of(
    st.just(DenseForm()),
    st.builds(LowRank, rank=whole),
    st.builds(LowRank, ratio=st.floats(1e-6, 10, allow_nan=False)),
    st.builds(LowRank, energy=st.floats(1e-300, 1.0, exclude_min=True)),
    st.builds(Int8, group=st.none() | whole, activations=st.booleans(), symmetric=st.booleans()),
    st.builds(Int4, group=whole, symmetric=st.booleans()),
    st.builds(BlockDiagonalForm, blocks=whole),
)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> Form:
    kind = draw(st.sampled_from(["leaf", "sum", "product", "pipe"])) if depth else "leaf"
    if kind == "leaf":
        return draw(leaves)
    parts = [draw(expressions(depth=depth - 1)) for _ in range(draw(st.integers(2, 3)))]
    if kind == "sum":
        return SumForm.of(*parts)
    if kind == "product":
        return ProductForm.of(*parts)
    left, right = parts[:2]
    return PipeForm(left, right) if left.dense_leaves and right.refits else left


@given(expressions())
@settings(max_examples=100, deadline=None)
def test_a_printed_form_reads_back_equal(form: Form) -> None:
    assert Form.parse(str(form)) == form
    assert hash(Form.parse(str(form))) == hash(form)


@given(st.text(max_size=40) | st.text(alphabet="int8 low_rank(=,)+@|0.5'truedense\n", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_form_or_one_clear_error(text: str) -> None:
    try:
        form = Form.parse(text)
    except FormError as error:
        said, _, mark = str(error).rpartition("\n")
        assert said.startswith("form: ")  # either outcome is right
        assert set(mark.strip()) == {"^"}
    else:
        assert Form.parse(str(form)) == form


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("low_rank(64)", LowRank(rank=64)),
        ("low_rank(0.5)", LowRank(ratio=0.5)),
        ("low_rank(ratio=1)", LowRank(ratio=1.0)),
        ("block_diagonal(8)", BlockDiagonalForm(8)),
        ("int8(activations=true)", Int8(activations=True)),
        ("int8( 32 , activations = True )", Int8(32, activations=True)),
        ("int4()", Int4()),
        ("dense+int4 @ dense", SumForm((DenseForm(), ProductForm((Int4(), DenseForm()))))),
        ("dense + dense | int8", PipeForm(SumForm((DenseForm(), DenseForm())), Int8())),
        ("dense + (dense | int8)", SumForm((DenseForm(), PipeForm(DenseForm(), Int8())))),
        ("(dense + int4) @ dense", ProductForm((SumForm((DenseForm(), Int4())), DenseForm()))),
        ("dense | low_rank(1) | int8", PipeForm(PipeForm(DenseForm(), LowRank(1)), Int8())),
        ("dense | (low_rank(1) | int8)", PipeForm(DenseForm(), PipeForm(LowRank(1), Int8()))),
        ("((int8))\n + \n int4", SumForm((Int8(), Int4()))),
        ("low_rank(1e-1)", LowRank(ratio=0.1)),
    ],
)
def test_meaning_of_text(text: str, form: Form) -> None:
    assert Form.parse(text) == form


def test_python_operators_build_what_the_text_says() -> None:
    a, b, c = LowRank(2), Int4(), DenseForm()
    assert a + b @ c | Int8() == Form.parse("low_rank(2) + int4 @ dense | int8")
    assert (a + b) + c == a + (b + c)
    assert (a @ b) @ c == a @ (b @ c)
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "marked", "says"),
    [
        ("low_rnak(4)", "low_rnak", "did you mean 'low_rank'?"),
        ("int8 + low_rank(rnak=4)", "rnak", "did you mean 'rank'?"),
        ("low_rank(0)", "low_rank(0)", "rank is 0, not positive"),
        ("low_rank(rank=-3)", "low_rank(rank=-3)", "rank is -3, not positive"),
        ("low_rank(rank=4, ratio=0.5)", "low_rank(rank=4, ratio=0.5)", "rank and ratio are given together"),
        ("low_rank", "low_rank", "no parameter is given"),
        ("low_rank(energy=1.5)", "low_rank(energy=1.5)", "not in (0, 1]"),
        ("low_rank(rank=true)", "true", "a whole number would work"),
        ("low_rank(rank=1.5)", "1.5", "a whole number would work"),
        ("int8(activations=1)", "1", "true or false would work"),
        ("block_diagonal(blocks='x')", "'x'", "a whole number would work"),
        ("int4(group='x')", "int4(group='x')", "a number of inputs, e.g. 32, or 'tensor' would work"),
        ("int4(group=1.5)", "1.5", "a whole number or a 'quoted' text would work"),
        ("int4(32, group=32)", "32", "given twice"),
        ("int4(group=1, group=2)", "group=2", "given twice"),
        ("int4(group=32, true)", "true", "cannot follow a named one"),
        ("block_diagonal(1, 3)", "3", "takes 1 unnamed"),
        ("block_diagonal", "block_diagonal", "block_diagonal(blocks=...) would work"),
        ("int8 | low_rank(4)", "int8 | low_rank(4)", "leaves no dense factor"),
        ("low_rank(4) | dense", "dense", "would leave every factor as it is"),
        ("int8 +", "", "the name of a form is needed"),
        ("", "", "the name of a form is needed"),
        ("int8 int4", "int4", "unexpected 'int4'"),
        ("(int8", "", "')' is needed"),
        ("int8)", ")", "unexpected ')'"),
        ("int4(group=)", ")", "a value is needed"),
        ("int4(group 3)", "3", "'=' is needed"),
        ("int4(3", "", "',' or ')' is needed"),
        ("int8 $ int4", "$", "unexpected character"),
        ("int8('x)", "'", "a text that does not end"),
        ("__import__('os')", "__import__", "unknown form"),
    ],
)
def test_errors_point_into_the_text(text: str, marked: str, says: str) -> None:
    with pytest.raises(FormError) as caught:
        Form.parse(text)
    message, line, marks = str(caught.value).split("\n")
    assert says in message
    start = marks.index("^") - 4
    assert line[4:] == text
    if marked:
        assert text[start : start + marks.count("^")] == marked
    else:
        assert start == len(text.rstrip())


def test_an_error_on_a_later_line_shows_that_line() -> None:
    with pytest.raises(FormError) as caught:
        Form.parse("int8 +\n  int5 +\nint4")
    assert str(caught.value).split("\n")[1:] == ["      int5 +", "      ^^^^"]


def test_deep_or_long_text_is_refused() -> None:
    with pytest.raises(FormError, match="nested more than"):
        Form.parse("(" * 5000 + "int8" + ")" * 4000)
    with pytest.raises(FormError, match="characters long"):
        Form.parse("int8 + " * 5000)
    with pytest.raises(FormError, match="a text is needed"):
        Form.parse(8)  # type: ignore[arg-type]


def test_every_form_describes_itself() -> None:
    for name, cls in forms().items():
        assert form_named(name) is cls
        assert cls.summary
        assert all(p.help and p.type for p in cls.parameters()), name
