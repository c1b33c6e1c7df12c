"""What a call of paged attention holds besides its results, for a plan's largest steps.

Those are its chunks, each alone; as many decodes as it has sequences, all of full length; and a
chunk with all others as decodes, in one list where the kernel takes one. Other mixtures cut other
pieces; the planner sets aside what no step exceeds.

K KV heads, G query heads of each, H head size; P processors.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from codegen.kernels.base import DTYPE_BYTES, Largest, Value

from .work import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    Queries,
    WorkList,
    chunk_list,
    mixed_list,
    packed_decodes,
    saves,
)

PROCESSORS = 132
"""Of an H100 or H200 in SXM form: more of them cut longer tiles in more pieces."""
LOGITS = 1 << 24
"""As reference.py."""
CHUNK_ROWS, CHUNK_KEYS, FP8_KEYS = 64, 64, 128
HOPPER_ROWS, HOPPER_KEYS = 128, 128
DECODE_ROWS, DECODE_KEYS, DECODE_STAGES, DECODE_RESIDENT = 16, 128, 3, 3
SHARED_BYTES = 220_000
DECODE_COST_HOPPER, DECODE_COST = 0.7, 1.0
"""As triton.py, which needs Triton to be read: a test holds `decode_tile` and `chunk_tile` to its
forms, and the rest to its constants."""


class Tile(NamedTuple):
    """What a kernel takes at a time."""

    rows: int
    keys: int
    tokens: int
    """A power of two."""
    resident: int
    """Blocks that a processor holds at once."""


def decode_tile(group: int, head_dim: int, page_tokens: int, item_bytes: int) -> Tile:
    """Of sequences with few queries, as triton.decode_form; item_bytes of a number in the pages."""
    rows, keys = max(DECODE_ROWS, _at_least(group)), min(DECODE_KEYS, page_tokens)
    buffers = DECODE_STAGES * keys * 2 * head_dim * item_bytes
    return Tile(
        rows=rows,
        keys=keys,
        tokens=_power_of_two(rows // group),
        resident=max(1, min(DECODE_RESIDENT, SHARED_BYTES // buffers)),
    )


def chunk_tile(group: int, page_tokens: int, *, hopper: bool, fp8: bool) -> Tile:
    """Of others, as triton.chunk_form."""
    rows = HOPPER_ROWS if hopper else max(CHUNK_ROWS, _at_least(group))
    return Tile(
        rows=rows,
        keys=HOPPER_KEYS if hopper else min(FP8_KEYS if fp8 else CHUNK_KEYS, page_tokens),
        tokens=_power_of_two(rows // group),
        resident=1 if hopper else 2,
    )


def torch_scratch(steps: Largest, q: Value, pages: Value, *others: object) -> int:
    """Keys and values in fp32, logits, and what queries and results become on the way."""
    tokens, heads, head_dim = (steps.sizes.get(str(dim), dim) for dim in q.shape)
    assert isinstance(tokens, int), "steps have sizes"
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(head_dim, int), "heads have a size"
    page_tokens, kv_heads = pages.shape[1:3]
    assert isinstance(page_tokens, int), "pages have a size"
    assert isinstance(kv_heads, int), "KV heads have a number"
    size, page_size = DTYPE_BYTES[q.dtype], DTYPE_BYTES[pages.dtype]
    casts = 0 if pages.dtype == "fp32" else 4
    padded = -(-steps.keys // page_tokens) * page_tokens
    result, row, small = tokens * heads * head_dim, 4 * tokens * heads, 64 * tokens + 16 * padded

    wide = kv_heads * head_dim
    gathered = padded * wide * (4 + page_size + casts + 4)  # K whole, V on its way
    logits = max(LOGITS, heads * steps.keys)
    logits = 4 * min(logits, tokens * heads * steps.keys)
    block = min(max(LOGITS // (heads * steps.keys), 1), tokens)
    masks = block * block + 2 * 8 * block
    turned = (3 * 4 * block * heads * head_dim) + masks
    chunk = 8 * padded * wide + logits + turned + (8 + size) * result

    # decodes that share a batch, and the copies that products and masks of them make
    room = LOGITS // max(heads, wide)
    batch = min(max(room, padded), steps.sizes["R"] * padded, 2 * steps.pool)
    rows = steps.sizes["R"] * heads * head_dim
    numbers = wide * max(12, 8 + page_size + casts)  # K, V, and V on its way, or a copy of either
    decode = batch * (numbers + 4 * heads + 9) + (12 + size) * rows
    scales = 12 * max(padded, batch) * kv_heads if pages.dtype == "fp8" else 0
    return max(gathered, chunk, decode) + scales + 8 * row + small


def library_scratch(steps: Largest, q: Value, *others: object) -> int:
    """A call's rows and its own results.

    Not counted: what it allocates inside, such as results of pieces, and keys and values that are
    gathered for versions which do not read pages of this size.
    """
    head_dim = q.shape[2]
    assert isinstance(head_dim, int), "heads have a size"
    return 2 * q.storage_bytes(steps.sizes) + 2 * 4 * q.storage_bytes(steps.sizes) // head_dim


def triton_kept(steps: Largest, q: Value, pages: Value, *others: object) -> int:
    """What all layers of a step share: partial results of pieces in fp32 with their logarithms of
    sums, the work list, and its counters."""
    head_dim = pages.shape[3]
    assert isinstance(head_dim, int), "heads have a size"
    return max(
        4 * work.slots * _kv_heads(pages) * (rows * (head_dim + 1) + 1)
        + 4 * (ITEM_FIELDS * len(work.items_IF) + MERGE_FIELDS * _merges(work) + 3 * 64)
        for rows, work in _lists(steps, q, pages)
    )


def _merges(work: WorkList) -> int:
    return 0 if work.merges_MF is None else len(work.merges_MF)


def _kv_heads(pages: Value) -> int:
    kv_heads = pages.shape[2]
    assert isinstance(kv_heads, int), "KV heads have a number"
    return kv_heads


def _lists(steps: Largest, q: Value, pages: Value) -> Iterator[tuple[int, WorkList]]:
    """Rows of a tile, and the list, of each of the largest steps."""
    heads, head_dim, page_tokens = q.shape[1], q.shape[2], pages.shape[1]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(head_dim, int), "heads have a size"
    assert isinstance(page_tokens, int), "pages have a size"
    kv_heads, fp8, item_bytes = _kv_heads(pages), pages.dtype == "fp8", DTYPE_BYTES[pages.dtype]
    group = heads // kv_heads
    few = decode_tile(group, head_dim, page_tokens, item_bytes)
    for tokens, keys in steps.chunks:
        if tokens <= few.tokens:
            continue  # a decode
        for hopper in (False, True):
            if hopper and (fp8 or page_tokens > HOPPER_KEYS or tokens * group <= CHUNK_ROWS):
                continue
            tile = chunk_tile(group, page_tokens, hopper=hopper, fp8=fp8)
            sizes: dict[str, Any] = {
                "tile_tokens": tile.tokens,
                "tile_keys": tile.keys,
                "kv_heads": kv_heads,
                "blocks": PROCESSORS * tile.resident,
            }
            yield tile.rows, chunk_list([_chunk(tokens, keys)], **sizes)
            # the rest of the step are decodes, of which a step has one a sequence
            count = min(steps.sizes["R"], steps.sizes["T"] - few.tokens) - 1
            if count < 1:
                continue
            chunk = [_chunk(min(tokens, steps.sizes["T"] - count), keys)]
            decodes = _decodes(steps, count, begin=chunk[0].end)
            sizes["decode_cost"] = DECODE_COST_HOPPER if hopper else DECODE_COST
            if saves(chunk, decodes, **sizes):
                # how many heads run side by side changes the order alone
                yield tile.rows, mixed_list(chunk, decodes, **sizes, heads_together=1)
    # one more or less is cut otherwise: all that a step has, and those beside a chunk
    for count in {steps.sizes["R"], max(steps.sizes["R"] - 1, 1)}:
        packed = packed_decodes(
            _decodes(steps, count),
            tile_keys=few.keys,
            blocks_a_head=max(1, PROCESSORS * few.resident // kv_heads),
            least=1,
        )
        yield few.rows, packed


def _chunk(tokens: int, keys: int) -> Queries:
    return Queries(sequence=0, begin=0, end=tokens, keys=max(keys, tokens), causal=True)


def _decodes(steps: Largest, count: int, *, begin: int = 0) -> list[Queries]:
    first = int(begin > 0)
    return [
        Queries(
            sequence=first + b, begin=begin + b, end=begin + b + 1, keys=steps.keys, causal=True
        )
        for b in range(count)
    ]


def _power_of_two(limit: int) -> int:
    return 1 << limit.bit_length() - 1


def _at_least(limit: int) -> int:
    """The least power of two from the limit on."""
    return 1 << (limit - 1).bit_length()
