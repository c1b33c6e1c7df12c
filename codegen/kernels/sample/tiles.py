"""The two kernels of `sample`: the best of each group of tokens, and the draw.

Logits are compared as integers of the same order (`key_of`), so that a threshold is found three
bits at a time; sums are double precision, as in the reference.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)
LIST = tl.constexpr(1024)
CHUNK = tl.constexpr(512)
NOTHING = tl.constexpr(0)
NAN_KEY = tl.constexpr(0xFFFFFFFF)
SIGN = tl.constexpr(0x80000000)
FAR = tl.constexpr(1 << 40)


@triton.jit
def key_of(x):
    """fp32 as int64 of the same order, from 1 up; NaN above all."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 ties with 0
    bits = x.to(tl.int32, bitcast=True).to(tl.int64) & NAN_KEY
    key = tl.where(bits >= SIGN, NAN_KEY - bits, bits + SIGN)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, NAN_KEY, key)


@triton.jit
def value_of(key):
    """The fp32 of a key, in double precision."""
    bits = tl.where(key >= SIGN, key - SIGN, NAN_KEY - key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def group_best_kernel(
    logits_ptr,
    controls_ptr,
    keys_ptr,
    sums_ptr,
    stride,
    vocab,
    groups,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = at < vocab
    x = tl.load(logits_ptr + row * stride + at, mask=there, other=float("-inf")).to(tl.float32)
    key = tl.max(tl.where(there, key_of(x), NOTHING), 1)
    tl.store(keys_ptr + row * groups + group, key, mask=group < groups)
    temperature = tl.load(controls_ptr + row * 5)
    top_k = tl.load(controls_ptr + row * 5 + 1)
    if (temperature > 0.0) & (top_k == 0.0):
        best = value_of(tl.maximum(key, 1))
        # a group of -inf alone has no best one to subtract
        best = tl.where(best == float("-inf"), 0.0, best)[:, None]
        part = tl.exp((x.to(tl.float64) - best) / temperature)
        tl.store(sums_ptr + row * groups + group, tl.sum(part, 1), mask=group < groups)


@triton.jit
def items_of(logits_ptr, list_ptr, first, count, whole):
    """Tokens `first` and following of a list, or of the whole row, with logits and keys."""
    at = first + tl.arange(0, CHUNK)
    there = at < count
    token = tl.where(whole > 0, at, tl.load(list_ptr + at, mask=there & (whole == 0), other=0))
    x = tl.load(logits_ptr + token, mask=there, other=float("-inf")).to(tl.float32)
    return token, x, tl.where(there, key_of(x), NOTHING)


@triton.jit
def weight_of(x, key, bound, best, temperature):
    """exp of the scaled logit of what is not below a bound."""
    scaled = (x.to(tl.float64) - best) / temperature
    return tl.where((key >= bound) & (key > 0), tl.exp(scaled), 0.0)


@triton.jit
def bound_of_groups(key, count):
    """The count-th largest key; 0 where there are fewer."""
    bound = tl.full([1], 0, tl.int64)
    for step in range(11):
        tried = bound + (tl.arange(0, 8).to(tl.int64) << (30 - 3 * step))
        enough = tl.sum((key[None, :] >= tried[:, None]).to(tl.int32), 1) >= count
        bound = tl.max(tl.where(enough | (tl.arange(0, 8) == 0), tried, 0), 0, keep_dims=True)
    return tl.max(bound, 0)


@triton.jit
def bound_of_items(
    logits_ptr, list_ptr, count, whole, bound, best, temperature, wanted, COUNTED: tl.constexpr
):
    """The largest key at or above which `wanted` tokens, or so much probability, lies."""
    found = tl.full([1], 0, tl.int64)
    for step in range(11):
        tried = found + (tl.arange(0, 8).to(tl.int64) << (30 - 3 * step))
        reached = tl.zeros([8], tl.float64)
        for first in range(0, count, CHUNK):
            _, x, key = items_of(logits_ptr, list_ptr, first, count, whole)
            if COUNTED:
                weight = tl.where(key > 0, 1.0, 0.0).to(tl.float64)
            else:
                weight = weight_of(x, key, bound, best, temperature)
            reached += tl.sum(tl.where(key[None, :] >= tried[:, None], weight[None, :], 0.0), 1)
        enough = (reached >= wanted) | (tl.arange(0, 8) == 0)
        found = tl.max(tl.where(enough, tried, 0), 0, keep_dims=True)
    return tl.max(found, 0)


@triton.jit(do_not_specialize=("rows",))  # else a batch of 1, of 16 and of 17 compile it each
def pick_kernel(  # noqa: C901, PLR0912, PLR0915 - one launch, whatever the row asks for
    logits_ptr,
    controls_ptr,
    keys_ptr,
    sums_ptr,
    chosen_ptr,
    list_ptr,
    out_ptr,
    stride,
    rows,
    vocab,
    groups,
    CANDIDATES: tl.constexpr,
    ALL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    chosen_ptr += row * groups
    list_ptr += row * LIST
    temperature = tl.load(controls_ptr + row * 5)
    top_k = tl.load(controls_ptr + row * 5 + 1)
    top_p = tl.load(controls_ptr + row * 5 + 2)
    min_p = tl.load(controls_ptr + row * 5 + 3)
    number = tl.load(controls_ptr + row * 5 + 4)
    group = tl.arange(0, ALL)
    keys = tl.load(keys_ptr + row * groups + group, mask=group < groups, other=0)
    best_key = tl.max(keys, 0)
    best = value_of(best_key)
    inside = tl.arange(0, GROUP)
    finite = (best_key < 0xFF800000) & (best_key > 0x007FFFFF)
    tl.store(out_ptr + rows + row, finite.to(tl.int64))
    if (temperature == 0.0) | (finite == 0):
        first = tl.min(tl.where(keys == best_key, group, ALL), 0)
        at = first * GROUP + inside
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        found = (key_of(x) == best_key) & (at < vocab)
        tl.store(out_ptr + row, tl.min(tl.where(found, at, vocab), 0).to(tl.int64))
    else:
        summed = tl.zeros([ALL], tl.float64)
        if top_k == 0.0:
            own = tl.load(sums_ptr + row * groups + group, mask=group < groups, other=0.0)
            scaled = (value_of(tl.maximum(keys, 1)) - best) / temperature
            summed = tl.where(own > 0.0, own * tl.exp(scaled), 0.0)
        if (top_k == 0.0) & (top_p >= 1.0) & (min_p == 0.0):
            # only the group in which the running sum passes the number is read again
            target = number * tl.sum(summed, 0)
            passed = tl.cumsum(summed, 0) > target
            last = tl.max(tl.where(summed > 0.0, group, 0), 0)
            here = tl.minimum(tl.min(tl.where(passed, group, ALL), 0), last)
            before = tl.sum(tl.where(group < here, summed, 0.0), 0)
            at = here * GROUP + inside
            x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            weight = tl.exp((x.to(tl.float64) - best) / temperature)
            token = tl.min(tl.where(before + tl.cumsum(weight, 0) > target, at, vocab), 0)
            last = tl.max(tl.where(weight > 0.0, at, 0), 0)
            tl.store(out_ptr + row, tl.minimum(token, last).to(tl.int64))
        else:
            # the groups that can hold what is drawn from, then their tokens above the bound
            asked = tl.where(top_k > 0.0, tl.minimum(top_k, FAR), CANDIDATES).to(tl.int64)
            floor = tl.maximum(bound_of_groups(keys, asked), 1)
            chosen = (keys >= floor).to(tl.int32)
            tl.store(chosen_ptr + tl.cumsum(chosen, 0) - 1, group, mask=chosen > 0)
            chosen_count = tl.sum(chosen, 0)
            tl.debug_barrier()
            count = 0
            for first in range(0, chosen_count, CHUNK // GROUP):
                at = first + tl.arange(0, CHUNK) // GROUP
                own = tl.load(chosen_ptr + at, mask=at < chosen_count, other=0)
                token = own * GROUP + tl.arange(0, CHUNK) % GROUP
                there = (at < chosen_count) & (token < vocab)
                x = tl.load(logits_ptr + token, mask=there, other=float("-inf")).to(tl.float32)
                kept = (there & (key_of(x) >= floor)).to(tl.int32)
                place = count + tl.cumsum(kept, 0) - 1
                tl.store(list_ptr + place, token, mask=(kept > 0) & (place < LIST))
                count += tl.sum(kept, 0)
            tl.debug_barrier()
            whole = (count > LIST).to(tl.int32)
            total = tl.sum(summed, 0)
            if (top_k == 0.0) & (whole == 0):
                held = tl.zeros([CHUNK], tl.float64)
                for first in range(0, count, CHUNK):
                    _, x, key = items_of(logits_ptr, list_ptr, first, count, whole)
                    held += weight_of(x, key, 0, best, temperature)
                nucleus = (top_p < 1.0) & (tl.sum(held, 0) >= top_p * total)
                unlikely = tl.exp((value_of(floor) - best) / temperature) < min_p
                whole = ((nucleus | unlikely) == 0).to(tl.int32)
            count = tl.where(whole > 0, vocab, count)
            bound = tl.full([1], 1, tl.int64)
            bound = tl.max(bound, 0)
            if top_k > 0.0:
                wanted = tl.minimum(top_k, vocab.to(tl.float64))
                bound = bound_of_items(
                    logits_ptr, list_ptr, count, whole, 0, best, temperature, wanted, COUNTED=True
                )
                held = tl.zeros([CHUNK], tl.float64)
                for first in range(0, count, CHUNK):
                    _, x, key = items_of(logits_ptr, list_ptr, first, count, whole)
                    held += weight_of(x, key, bound, best, temperature)
                total = tl.sum(held, 0)
            edge = tl.max(tl.full([1], 0, tl.int64), 0)
            above = tl.sum(tl.zeros([1], tl.float64), 0)
            if top_p < 1.0:
                edge = bound_of_items(
                    logits_ptr,
                    list_ptr,
                    count,
                    whole,
                    bound,
                    best,
                    temperature,
                    top_p * total,
                    COUNTED=False,
                )
                held = tl.zeros([CHUNK], tl.float64)
                for first in range(0, count, CHUNK):
                    _, x, key = items_of(logits_ptr, list_ptr, first, count, whole)
                    weight = weight_of(x, key, bound, best, temperature)
                    held += tl.where(key > edge, weight, 0.0)
                above = tl.sum(held, 0)
            # twice over what is left: its sum, then the token at which the sum passes the number
            left = tl.sum(tl.zeros([1], tl.float64), 0)
            target = left
            token = vocab
            last = 0
            for turn in range(2):
                reached = tl.sum(tl.zeros([1], tl.float64), 0)
                ties = 0
                for first in range(0, count, CHUNK):
                    own, x, key = items_of(logits_ptr, list_ptr, first, count, whole)
                    weight = weight_of(x, key, bound, best, temperature)
                    tied = (key == edge).to(tl.int32)
                    rank = (ties + tl.cumsum(tied, 0) - 1).to(tl.float64)
                    ties += tl.sum(tied, 0)
                    kept = (key > edge) | ((tied > 0) & (above + rank * weight < top_p * total))
                    weight = tl.where(kept & (weight >= min_p), weight, 0.0)
                    if turn == 1:
                        passed = reached + tl.cumsum(weight, 0) > target
                        token = tl.minimum(
                            token, tl.min(tl.where(passed & (key > 0), own, vocab), 0)
                        )
                        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, own, 0), 0))
                    reached += tl.sum(weight, 0)
                left = reached
                target = number * left
            tl.store(out_ptr + row, tl.minimum(token, last).to(tl.int64))
