"""A Gluon kernel that does not compile on a Triton is given up, in words and once, and replaced."""

import pytest
import torch
import triton

from codegen.kernels.linear import core
from codegen.kernels.linear import gluon as streaming
from codegen.kernels.paged_attention import gluon as attending
from codegen.kernels.paged_attention import triton as attention

HOPPER = torch.device("cuda", 0)
HEADS = attention.Heads(
    kv_heads=8,
    group=4,
    head_dim=128,
    page_tokens=128,
    dtype=torch.bfloat16,
    page_dtype=torch.bfloat16,
)


def refused(*args: object, **options: object) -> None:
    """As a compiler of another version."""
    raise RuntimeError("PassManager::run failed\nsecond line")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch):
    """A device of Hopper's capability, which nothing here touches; nothing tried out before."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for tried in (attention._hopper, core._hopper):  # noqa: SLF001 - what is tried once
        tried.cache_clear()
    yield
    for tried in (attention._hopper, core._hopper):  # noqa: SLF001
        tried.cache_clear()


def test_attention_says_that_chunks_take_the_portable_kernel_and_takes_it(monkeypatch):
    monkeypatch.setattr(attending, "try_out", refused)
    with pytest.warns(RuntimeWarning, match="Gluon kernel fails") as told:
        form = attention.chunk_form(HEADS, HOPPER, longest=4096)
    assert form.hopper is None
    assert form.rows == attention.CHUNK_ROWS
    (words,) = [str(each.message) for each in told]
    assert triton.__version__ in words
    assert "PassManager::run failed" in words
    assert "second line" not in words
    assert "0.7 of the rate" in words
    attention.chunk_form(HEADS, HOPPER, longest=4096)  # filterwarnings = error: said once


def test_attention_takes_a_gluon_kernel_that_compiles_in_silence(monkeypatch):
    monkeypatch.setattr(attending, "try_out", lambda device, heads: None)
    assert attention.chunk_form(HEADS, HOPPER, longest=4096).hopper is not None


def test_products_say_that_few_tokens_take_the_library_and_take_it(monkeypatch):
    monkeypatch.setattr(core, "_try_out", refused)
    with pytest.warns(RuntimeWarning, match="Gluon kernel fails") as told:
        assert core._hopper(HOPPER) is None  # noqa: SLF001 - on which `takes` depends
    (words,) = [str(each.message) for each in told]
    assert triton.__version__ in words
    assert "library" in words
    assert core._hopper(HOPPER) is None  # noqa: SLF001


def test_products_take_a_gluon_kernel_that_compiles_in_silence(monkeypatch):
    monkeypatch.setattr(core, "_try_out", lambda device, launch: None)
    assert core._hopper(HOPPER) is streaming.run  # noqa: SLF001
