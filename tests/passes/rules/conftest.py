import pytest


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    """Whether texts on record are to be written anew."""
    return bool(request.config.getoption("--accept", default=False))
