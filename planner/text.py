"""Numbers as people read them: tokens, seconds, bytes; used by everything that explains."""


def tokens_text(tokens: int) -> str:
    """8192 as 8k, 1048576 as 1m; other numbers as they are."""
    for suffix, unit in (("m", 1 << 20), ("k", 1 << 10)):
        if tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


def seconds_text(seconds: float) -> str:
    """Three digits with the unit that suits."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
