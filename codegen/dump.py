"""What `--dump-graph` writes: the graphs behind each pass, and a summary of all of them.

Each file begins with the pass and how often it changed something; behind the last pass each call
has the bytes that are held while it runs.
"""

from codegen.graph import Peak, Program, op_name, text_of
from plans.plan import Plan


class Dump:
    """Collects texts while passes work on a program."""

    def __init__(self, program: Program) -> None:
        """Notes the program as it was captured."""
        self._program = program
        self._rows: list[tuple[str, int | None, tuple[int, ...]]] = []
        self._graphs: list[str] = []
        self.add("capture", None)

    def add(self, name: str, matches: int | None) -> None:
        """Notes the program behind a pass; None matches for what is none."""
        graphs = self._program.graphs
        calls = tuple(sum(op_name(node) is not None for node in graph.nodes) for graph in graphs)
        self._rows.append((name, matches, calls))
        self._graphs.append(
            "\n".join(f"stage {stage}\n{text_of(graph)}" for stage, graph in enumerate(graphs))
        )

    def texts(self, plan: Plan) -> dict[str, str]:
        """Text by name: `<number>-<pass>`, and `summary`."""
        last, peaks = len(self._rows) - 1, _peaks(self._program.peaks, plan)
        found = {}
        for number, ((name, matches, calls), graph) in enumerate(
            zip(self._rows, self._graphs, strict=True)
        ):
            head = (
                f"# {name}, pass {number} of {last}: {_counted(matches)}"
                if number
                else "# captured"
            )
            lines = [head, f"# calls by stage: {', '.join(map(str, calls))}"]
            if number == last:
                lines += [f"# {line}" for line in peaks]
            found[f"{number}-{name}"] = "\n".join(lines) + f"\n\n{graph}"
        return {**found, "summary": self._summary(peaks)}

    def _summary(self, peaks: list[str]) -> str:
        wide = max(len(name) for name, _, _ in self._rows)
        lines = [f"{'pass':<{wide}}  matches  calls by stage"]
        for name, matches, calls in self._rows:
            shown = "" if matches is None else str(matches)
            lines.append(f"{name:<{wide}}  {shown:>7}  {' '.join(map(str, calls))}")
        return "\n".join([*lines, "", *peaks]) + "\n"


def _counted(matches: int | None) -> str:
    return "1 match" if matches == 1 else f"{matches} matches"


def _peaks(peaks: list[Peak], plan: Plan) -> list[str]:
    """Where each stage holds most."""
    steps = f"in the largest steps, of {plan.scheduler.max_step_tokens} tokens"
    lines = [f"bytes held {steps}, besides weights, pages and inputs:"]
    for stage, peak in enumerate(peaks):
        where = "" if peak.layer is None else f" of layer {peak.layer}"
        lines.append(
            f"stage {stage}: {peak.bytes} in {peak.op}{where}: {peak.values} of values that live"
            f" through it, {peak.results} of its results, {peak.inside} inside"
        )
    return lines
