"""Plants one bug for each invariant of the scheduler in a copy of the tree and runs its tests.

    python bench/scheduler_mutations.py          all, one line each; exit 1 if one survives

Not collected by pytest: each mutation costs some seconds. The tests run in a fresh process on the
copy, so nothing of the tree itself is touched.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/runtime/test_engine_machine.py",
    "tests/runtime/test_engine.py",
    "tests/runtime/test_kvcache.py",
]
MUTATIONS = {
    "a page leaks": (
        "runtime/kvcache.py",
        "for page in reversed(pages):",
        "for page in reversed(pages[1:]):",
    ),
    "a page is held twice": (
        "runtime/kvcache.py",
        "taken = tuple(free.pop() for _ in range(count))",
        "taken = tuple(free[-1 - each] for each in range(count))",
    ),
    "an evicted request is lost": (
        "runtime/book.py",
        "        table.remove(sequence.number)\n        self._wait(sequence)\n",
        "        table.remove(sequence.number)\n",
    ),
    "a request ends twice": (
        "runtime/engine.py",
        "        self.records.append(record)\n",
        "        self.records.append(record)\n        self.records.append(record)\n",
    ),
    "a token is computed twice": (
        "runtime/book.py",
        "        sequence.scheduled += tokens\n",
        "        sequence.scheduled += max(tokens - 1, 1)\n",
    ),
    "the time budget is ignored": (
        "runtime/scheduler/pack.py",
        "        cut = tokens < most\n",
        "        cut, tokens = tokens < most, most\n",
    ),
    "every prefill makes its least progress": (
        "runtime/scheduler/pack.py",
        "                least = False\n",
        "                least = True\n",
    ),
    "a step outgrows its cap": (
        "runtime/scheduler/pack.py",
        "            self._config.max_step_tokens - in_group,\n",
        "            self._config.max_step_tokens,\n",
    ),
    "a chunk crosses its shard": (
        "runtime/scheduler/pack.py",
        "            shard - prefix % shard,\n",
        "            sequence.missing,\n",
    ),
    "a prefill displaces decodes": (
        "runtime/scheduler/pack.py",
        'rows = np.flatnonzero(~running["in_flight"])',
        'rows = np.flatnonzero(~running["in_flight"])[: 1 if len(book.waiting) else None]',
    ),
    "a decode runs before its token exists": (
        "runtime/scheduler/commit.py",
        '        book.running["in_flight"][rows] = True\n',
        "",
    ),
    "max_tokens is exceeded after an eviction": (
        "runtime/book.py",
        "        sequence.evictions += 1\n",
        "        sequence.evictions += 1\n        sequence.generated = 0\n",
    ),
    "a victim is in flight": (
        "runtime/scheduler/memory.py",
        "        if sequence.in_flight or sequence.number in keep:\n",
        "        if sequence.number in keep:\n",
    ),
    "growth waits for itself": (
        "runtime/scheduler/memory.py",
        "    while book.pools.free_pages(group) < pages:\n",
        "    while book.pools.free_pages(group) < pages:\n        return Room.LATER\n",
    ),
    "the schedule is not reproducible": (
        "runtime/scheduler/order.py",
        "chosen[np.lexsort((numbers[chosen], keys[chosen]))]",
        "chosen[np.lexsort((np.random.default_rng().random(len(chosen)), keys[chosen]))]",
    ),
}


PATIENCE_S = 120
"""The tests take a tenth of it; shrinking a failing example may take all of it."""


def passes(path: str, old: str, new: str) -> bool:
    """Whether the tests pass with the text replaced; raises ValueError where it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("plans", "runtime", "tests", "planner"):
            shutil.copytree(ROOT / part, copy / part)
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = (copy / path).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{old!r} stands {source.count(old)} times in {path}")
        (copy / path).write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
        try:
            done = subprocess.run(
                command, cwd=copy, capture_output=True, check=False, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            return False  # a bug that keeps the engine from draining
        return done.returncode == 0


def main() -> int:
    """Runs all mutations, or those named."""
    title = '"""The engine loop'
    if not passes("runtime/engine.py", title, title):
        print("the tests fail without any bug planted", file=sys.stderr)
        return 1
    left = 0
    for name in sys.argv[1:] or MUTATIONS:
        alive = passes(*MUTATIONS[name])
        left += alive
        print(f"{'SURVIVES' if alive else 'caught  '}  {name}", flush=True)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
