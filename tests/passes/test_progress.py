"""Progress bars, one within another."""

from collections.abc import Iterator

import pytest

from recast.passes import progress


def test_a_bar_within_a_bar_is_a_line_of_the_same_display(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for outer in progress.track(range(3), "outer", progress=True):
        (display,) = progress._displays
        for inner in progress.track(range(2), "inner", progress=True):
            seen.append((outer, inner))
            assert progress._displays == [display]
            assert [task.description for task in display.tasks] == ["outer", "inner"]
        assert [task.description for task in display.tasks] == ["outer"]
    assert seen == [(i, j) for i in range(3) for j in range(2)]
    assert not progress._displays


def test_a_failure_within_takes_its_bar_along() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError

    with pytest.raises(KeyError):
        list(progress.track(failing(), "failing", progress=True))
    assert not progress._displays


def test_nothing_is_shown_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([1, 2], "counting", progress=False)) == [1, 2]
    assert capsys.readouterr().err == ""
