"""Plants one bug for each invariant of the scheduler in a copy of the tree and runs its tests.

    python bench/scheduler_mutations.py          all, one line each; exit 1 if one survives

Not collected by pytest: each mutation costs some seconds. The tests run in a fresh process on the
copy, so nothing of the tree itself is touched.
"""

import argparse
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
    "tests/runtime/test_pack.py",
    "tests/runtime/test_share.py",
]
MUTATIONS = {
    "a page leaks": (
        "runtime/kvcache.py",
        "for page in reversed(pages):",
        "for page in reversed(pages[1:]):",
    ),
    "a page is held twice": (
        "runtime/kvcache.py",
        "        del free[-count:]\n",
        "",
    ),
    "an evicted request is lost": (
        "runtime/book.py",
        "            self.waiting.remove(sequence.number)\n        self._wait(sequence)\n",
        "            self.waiting.remove(sequence.number)\n",
    ),
    "a request ends twice": (
        "runtime/engine.py",
        "        self.records.append(record)\n",
        "        self.records.append(record)\n        self.records.append(record)\n",
    ),
    "a token is computed twice": (
        "runtime/book.py",
        "        scheduled = sequence.scheduled + tokens\n",
        "        scheduled = sequence.scheduled + max(tokens - 1, 1)\n",
    ),
    "the time budget is ignored": (
        "runtime/scheduler/pack.py",
        "        if tokens < floor and least:\n",
        "        tokens = most\n        if tokens < floor and least:\n",
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
        "decodes = book.ready()\n",
        "decodes = book.ready()[: 1 if len(book.waiting) else None]\n",
    ),
    "a decode runs before its token exists": (
        "runtime/scheduler/commit.py",
        "            sequence.in_flight += 1\n",
        "",
    ),
    "max_tokens is exceeded after an eviction": (
        "runtime/book.py",
        "        sequence.evictions += 1\n",
        "        sequence.evictions += 1\n        sequence.generated = 0\n",
    ),
    "a victim is in flight": (
        "runtime/scheduler/memory.py",
        "if pages and not sequence.in_flight and -number not in self._members:",
        "if pages and -number not in self._members:",
    ),
    "growth waits for itself": (
        "runtime/scheduler/memory.py",
        "    if idle.make_room(taker, group, 1):\n",
        "    if not book.pools.free_pages(group):\n        return Room.LATER\n    if True:\n",
    ),
    "a victim has a part in the step": (
        "runtime/scheduler/memory.py",
        "if pages and not sequence.in_flight and -number not in self._members:",
        "if pages and not sequence.in_flight:",
    ),
    "best effort without pages ends the step for others": (
        "runtime/scheduler/pack.py",
        "        draft.misses = 0  # one",
        "        # one",
    ),
    "pages are taken in vain": (
        "runtime/scheduler/memory.py",
        "        if freed[count] < missing:\n",
        "        if not count:\n",
    ),
    "the time between tokens is ignored": (
        "runtime/scheduler/budget.py",
        "budget_s = min(budget_s, max(self.until(due_s, now_s), 0.5 * step_budget_s))",
        "pass",
    ),
    "the step ahead is forgotten": (
        "runtime/scheduler/budget.py",
        "(due_s - max(leaves_s, now_s)) / share",
        "(due_s - now_s) / share",
    ),
    "best effort never goes first": (
        "runtime/scheduler/share.py",
        "enumerate(self._credit_s) if credit > 0)",
        "enumerate(self._credit_s) if credit > 1e9)",
    ),
    "best effort always goes first": (
        "runtime/scheduler/share.py",
        "enumerate(self._credit_s) if credit > 0)",
        "enumerate(self._credit_s) if credit > -1e9)",
    ),
    "best effort makes no least progress in its turn": (
        "runtime/scheduler/pack.py",
        "self._place_all(draft, demoted, least=True, only=due)",
        "self._place_all(draft, demoted, least=False, only=due)",
    ),
    "time that nobody wanted is a debt": (
        "runtime/scheduler/share.py",
        "                credit = min(credit, -used)\n",
        "                credit -= used\n",
    ),
    "long prompts crowd out the short ones": (
        "runtime/scheduler/pack.py",
        "            if candidate.long and group in draft.long_groups:\n",
        "            if candidate.long and group in ():\n",
    ),
    "a long prompt is set aside by the group it was in before": (
        "runtime/scheduler/pack.py",
        "            if candidate.long and group in draft.long_groups:\n",
        "            if candidate.long and 0 in draft.long_groups:\n",
    ),
    "a long prompt yields nothing": (
        "runtime/scheduler/pack.py",
        "yielded_s = draft.loads.seconds() + candidate.share * draft.budget_s",
        "yielded_s = draft.loads.seconds()",
    ),
    "the home ignores what is pending": (
        "runtime/scheduler/pages.py",
        "key=lambda each: (pending_s[each] + loads.group_seconds(each), each)",
        "key=lambda each: (loads.group_seconds(each), each)",
    ),
    "the home ignores the step": (
        "runtime/scheduler/pages.py",
        "key=lambda each: (pending_s[each] + loads.group_seconds(each), each)",
        "key=lambda each: (pending_s[each], each)",
    ),
    "a refusal for want of pages holds for shorter prompts too": (
        "runtime/scheduler/pages.py",
        "return tokens >= self.refused[0] and number > self.refused[1]",
        "return self.refused[0] < 1 << 62",
    ),
    "pages kept in one group refuse who has some kept in another": (
        "runtime/scheduler/pages.py",
        "step.refused = sequence.length, self._kept.newest_before(sequence)",
        "step.refused = sequence.length, min(self._kept.numbers())",
    ),
    "a decode in flight bounds no step": (
        "runtime/scheduler/budget.py",
        "        if len(decodes) < len(book.running):\n",
        "        if False:\n",
    ),
    "a home without room is chosen": (
        "runtime/scheduler/pages.py",
        "            roomy or groups, key=",
        "            groups, key=",
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MUTATIONS)}; all by default")
    names = parser.parse_args().names
    if unknown := [each for each in names if each not in MUTATIONS]:
        parser.error(f"no mutation {unknown[0]!r}; known: {', '.join(MUTATIONS)}")
    title = '"""The engine loop'
    if not passes("runtime/engine.py", title, title):
        print("the tests fail without any bug planted", file=sys.stderr)
        return 1
    left = 0
    for name in names or MUTATIONS:
        alive = passes(*MUTATIONS[name])
        left += alive
        print(f"{'SURVIVES' if alive else 'caught  '}  {name}", flush=True)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
