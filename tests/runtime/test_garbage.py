"""What stands when serving begins is out of the collector's sight, until it is replaced."""

import gc
import weakref

from runtime.garbage import settle


class Loaded:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_stands_is_not_looked_at_until_the_next_call():
    loaded = Loaded()
    seen = weakref.ref(loaded)
    try:
        settle()
        assert gc.get_freeze_count() > 1000
        del loaded
        gc.collect()
        assert seen() is not None
        settle()
        assert seen() is None
    finally:
        gc.unfreeze()
