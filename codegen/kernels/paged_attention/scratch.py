"""What a call of paged attention holds besides its results, for a plan's largest steps.

Those are its chunks, each alone, and as many decodes as it has sequences, all of full length. A
step that mixes them cuts other pieces; the planner sets aside what no step exceeds.

K KV heads, G query heads of each, H head size; P processors.
"""

from codegen.kernels.base import DTYPE_BYTES, Largest, Value

from .work import ITEM_FIELDS, MERGE_FIELDS, Queries, WorkList, chunk_list, packed_decodes

PROCESSORS = 132
"""Of an H100 or H200 in SXM form: more of them cut longer tiles in more pieces."""
LOGITS = 1 << 24
"""As reference.py."""
HOPPER, PORTABLE, FP8 = (128, 128, 1), (64, 64, 2), (64, 128, 2)
"""Rows and keys of a chunk's tile and blocks of it a processor: Gluon's, the portable one's for
pages in 16 bits and in fp8."""
DECODE_ROWS, DECODE_KEYS, DECODE_RESIDENT = 16, 128, 3
SHARED_BYTES = 220_000
"""As triton.py chooses."""


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


def _lists(steps: Largest, q: Value, pages: Value) -> list[tuple[int, WorkList]]:
    """Rows of a tile, and the list, of each of the largest steps."""
    heads, head_dim, page_tokens = q.shape[1], q.shape[2], pages.shape[1]
    assert isinstance(heads, int), "heads have a number"
    assert isinstance(head_dim, int), "heads have a size"
    assert isinstance(page_tokens, int), "pages have a size"
    kv_heads = _kv_heads(pages)
    group = heads // kv_heads
    found = []
    for tokens, keys in steps.chunks:
        if tokens <= max(DECODE_ROWS // group, 1):
            continue  # a decode
        forms = [FP8] if pages.dtype == "fp8" else [PORTABLE]
        if pages.dtype != "fp8" and tokens * group > PORTABLE[0]:
            forms.append(HOPPER)
        chunk = [Queries(sequence=0, begin=0, end=tokens, keys=max(keys, tokens), causal=True)]
        for tile_rows, tile_keys, resident in forms:
            rows = max(tile_rows, _at_least(group))
            work = chunk_list(
                chunk,
                tile_tokens=_power_of_two(max(rows // group, 1)),
                tile_keys=min(tile_keys, page_tokens),
                kv_heads=kv_heads,
                blocks=PROCESSORS * resident,
            )
            found.append((rows, work))
    keys = min(DECODE_KEYS, page_tokens)
    buffers = 3 * keys * 2 * head_dim * DTYPE_BYTES[pages.dtype]
    at_once = PROCESSORS * max(1, min(DECODE_RESIDENT, SHARED_BYTES // buffers))
    decodes = [
        Queries(sequence=b, begin=b, end=b + 1, keys=steps.keys, causal=True)
        for b in range(steps.sizes["R"])
    ]
    work = packed_decodes(
        decodes, tile_keys=keys, blocks_a_head=max(1, at_once // kv_heads), least=1
    )
    return [*found, (max(DECODE_ROWS, _at_least(group)), work)]


def _power_of_two(limit: int) -> int:
    return 1 << limit.bit_length() - 1


def _at_least(limit: int) -> int:
    """The least power of two from the limit on."""
    return 1 << (limit - 1).bit_length()
