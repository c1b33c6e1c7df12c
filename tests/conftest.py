"""What every test shares: interpreter, hypothesis settings, gpu marker, golden files."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Triton decides at decoration whether a kernel is compiled or interpreted, its own library
# included, so this stands before the first import of triton. The device node is looked for, not
# torch.cuda, since the scheduler's and planner's tests do without torch. Whoever compiles in a
# child process (the kernel gate) takes the variable out of that child's environment.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread: the models of the tests are so small that more threads only wait for each other, and
# torch reads the variable once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests never time, so a slow example is no failure; CI draws the same examples in every run.
hypothesis.settings.register_profile(
    "medha",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("medha")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh", action="store_true", help="rewrite the golden files that differ, then pass"
    )
    parser.addoption("--seed", type=int, help="of random data on a GPU, instead of a new one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu where torch sees no CUDA device; asks torch only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # noqa: PLC0415 - most runs have no such test and should not wait for torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the golden file of that name, in the folder `golden` beside the test.

    With --refresh a file that differs is rewritten instead; git then shows what changed.
    """

    def compare(name: str, text: str) -> None:
        path = request.path.parent / "golden" / name
        if request.config.getoption("--refresh"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
        assert path.exists(), f"no golden file {path}; write it with pytest --refresh"
        assert text == path.read_text(), f"{path} differs; if that is meant: pytest --refresh"

    return compare


@pytest.fixture(scope="module")
def poison() -> Iterator[None]:
    """Poisons fresh memory (tests/poisoning.py) until the module's last test."""
    import poisoning  # noqa: PLC0415 - imports torch

    with pytest.MonkeyPatch.context() as patch:
        poisoning.poison(patch)
        yield


@pytest.fixture
def fresh_seed(request: pytest.FixtureRequest) -> int:
    """A seed that a failing test shows: a new one in each run on a GPU, or that of --seed."""
    import poisoning  # noqa: PLC0415 - imports torch

    seed: int = poisoning.fresh_seed(request.config.getoption("--seed"))
    print(f"--seed {seed}")  # noqa: T201 - pytest shows it where the test fails
    return seed
