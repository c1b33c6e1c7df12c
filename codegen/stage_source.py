"""Prints the graph of one stage as a Python module.

The straight-line program is printed first, each line with the layer it belongs to and with `{i}` in
place of that layer's number. Where all layers' lines are then the same text, they become one loop:
the loop is by construction the straight-line program rolled up. The first layer may begin otherwise
(it has no residual add to fuse), which becomes an `if`.
"""

import operator
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import fx

from codegen.graph import COLLECTIVES, INV_FREQ, op_name
from codegen.models.frequencies import inverse_frequencies
from plans.ops import Parameter
from plans.plan import Plan

WIDTH = 100
HEADER = '''"""Stage {stage} of {stages}: layers {layers} of {model}, at tp {tp}, kvp {kvp}.

T tokens of the step, R sampled rows, D hidden, N query heads, K KV heads, H head size, O outputs of
a projection, F ffn, V vocabulary; inside, N, K, O, F and V are one rank's share.
The largest step, of {tokens} tokens, holds {mib:.1f} MiB besides weights, pages and its inputs.
"""
'''
RECORDABLE = '''RECORDABLE = {recordable}
"""Whether steps may be recorded as CUDA graphs: all of a step of decodes, of others in pieces."""
APART = {apart}
"""Ops whose launches follow the lengths of a step's sequences: they stand between two pieces."""
SELECTS = {selects}
"""Op behind which only the sampled rows are left; None where they are not selected here."""
'''
SAMPLER = '''SAMPLE = {op}
"""Draws from logits_RV, each row by its (temperature, top_k, top_p, min_p, number in [0, 1))."""
'''
EXCHANGE = '''EXCHANGE = {ops}
"""Pack partial attention for other KVP groups, and merge theirs: what comm.merge may use."""
'''
PLACEHOLDERS = ("token_ids_T", "positions_T", "slots_T", "sample_rows_R")


@dataclass(frozen=True)
class Line:
    """A statement: `{i}` stands for its layer, `{k}` for the layer's place in the stage's cache."""

    layer: int | None
    text: str

    def alone(self, first: int) -> str:
        """The statement of this very layer; `first` is the stage's first."""
        if self.layer is None:
            return self.text
        return self.text.replace("{i}", f"{self.layer}").replace("{k}", f"{self.layer - first}")


def _in_loop(text: str, first: int) -> str:
    """The statement of layer i."""
    text = re.sub(r'"[^"]*\{i\}[^"]*"', r"f\g<0>", text)
    return text.replace("{k}", "i" if first == 0 else f"i - {first}")


def stage_source(
    graph: fx.Graph,
    *,
    plan: Plan,
    stage: int,
    peak_bytes: int,
    sampler: str | None = None,
    exchange: tuple[str, ...] = (),
) -> str:
    """The module of one stage.

    peak_bytes  goes into its docstring
    sampler     op that it hands on to the runtime, which draws with it
    exchange    ops that it hands on too, for what kvp groups send each other
    """
    first, end = plan.stages[stage]
    rotary = any(node.target == INV_FREQ for node in graph.nodes)
    ops = {op for node in graph.nodes if (op := op_name(node)) and op not in COLLECTIVES}
    ops |= {*exchange, *([sampler] if sampler else [])}
    imports = [f"from .{op} import {op}" for op in sorted(ops)]
    body = _body(_statements(graph, first), first, end)
    if rotary:
        body.insert(0, "inv_freq_H2 = frequencies(inputs.positions_T.device)")
    result = "logits_RV in fp32 over the whole vocabulary"
    if end < plan.model.layers:
        result = f"hidden_TD behind layer {end - 1}"
    parts = [
        HEADER.format(
            stage=stage,
            stages=len(plan.stages),
            layers=f"{first} to {end - 1}",
            model=plan.model.name,
            tp=plan.parallelism.tp,
            kvp=plan.parallelism.kvp,
            tokens=plan.scheduler.max_step_tokens,
            mib=peak_bytes / 2**20,
        ),
        *(["import functools\n"] if rotary else []),
        "import torch\n",
        "\n".join(imports) + "\n",
        _parameters(graph, first, end),
        RECORDABLE.format(
            recordable=recordable(graph),
            apart="(" + "".join(f'"{op}", ' for op in _readers(graph, "inputs")).rstrip() + ")",
            selects=next((f'"{op}"' for op in _readers(graph, "sample_rows_R")), None),
        ),
        *([SAMPLER.format(op=sampler)] if sampler else []),
        *([EXCHANGE.format(ops=", ".join(exchange))] if exchange else []),
        *([_frequencies(plan)] if rotary else []),
        f'def forward(weights, inputs, kv, comm):\n    """Runs one step; returns {result}."""\n'
        + textwrap.indent("\n".join(body), "    ")
        + "\n",
    ]
    text = "\n".join(parts)
    for name in ("\nPARAMETERS", "\n@functools", "\ndef forward"):
        text = text.replace(name, f"\n{name}")
    return text


def recordable(graph: fx.Graph) -> bool:
    """Whether a decode step's launches may be recorded and run again with other numbers.

    Ops that know sequences or slots read them on the host, in their reference; our kernels read
    them on the device. Collectives are the runtime's, which records them on all ranks alike.
    """
    reading = {*_readers(graph, "inputs"), *_readers(graph, "slots_T")}
    return all(node.meta["target"] == "triton" for node in graph.nodes if op_name(node) in reading)


def _readers(graph: fx.Graph, placeholder: str) -> tuple[str, ...]:
    """Names of the ops that read one of the step's inputs."""
    found = {
        op
        for node in graph.nodes
        for each in node.all_input_nodes
        if each.op == "placeholder" and each.target == placeholder and (op := op_name(node))
    }
    return tuple(sorted(found))


# --- statements -----------------------------------------------------------------------------------


class _Names:
    """Which variable holds which value, so that a name is used again once its value is dead."""

    def __init__(self, graph: fx.Graph) -> None:
        self.text: dict[fx.Node, str] = {}
        """How each value is spelled."""
        self.holds: dict[str, fx.Node] = {}
        """What each variable holds, dead or alive."""
        self._last_use = {each: node for node in graph.nodes for each in node.all_input_nodes}
        self._dead: set[fx.Node] = set()

    def use(self, node: fx.Node) -> None:
        """Notes the values that a call is the last to read."""
        self._dead |= {each for each in node.all_input_nodes if self._last_use[each] is node}

    def bind(self, node: fx.Node) -> str:
        """The variable of a new value: its wanted name, numbered if a live value has that."""
        wanted = name = node.meta["name"]
        number = 2
        while name in self.holds and self.holds[name] not in self._dead:
            name, number = f"{wanted}_{number}", number + 1
        self.text[node], self.holds[name] = name, node
        return str(name)

    def unbind(self, nodes: tuple[fx.Node, ...]) -> list[str]:
        """The variables that still hold these values, which are then gone."""
        gone = sorted(self.text[node] for node in nodes if self.holds.get(self.text[node]) is node)
        for name in gone:
            del self.holds[name]
        return gone


def _statements(graph: fx.Graph, first: int) -> list[Line]:
    """The straight-line program."""
    lines: list[Line] = []
    names = _Names(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            lines += _placeholder_lines(node, names)
        elif node.op == "output":
            lines.append(Line(None, f"return {names.text[node.args[0]]}"))
        elif node.op == "call_function" and node.target is not operator.getitem:
            lines += _call_lines(node, names, first)
    return lines


def _placeholder_lines(node: fx.Node, names: _Names) -> list[Line]:
    target = str(node.target)
    if target == "hidden_TD":
        return [Line(None, f"{names.bind(node)} = inputs.hidden_TD")]
    if target in {"inputs", "comm"}:
        names.text[node] = target
    elif target in PLACEHOLDERS:
        names.text[node] = f"inputs.{target}"
    else:  # k_pages_3
        names.text[node] = f"kv.{target.rsplit('_', 1)[0]}[{{k}}]"
    return []


def _call_lines(node: fx.Node, names: _Names, first: int) -> list[Line]:
    """The call, and a `del` of what it was the last to read and no new name covers."""
    layer, op = node.meta["layer"], op_name(node)
    assert op is not None, f"{node} calls nothing"
    args = [_argument(each, names, layer) for each in node.args]
    names.use(node)
    results: list[fx.Node] = [node]
    index = ""
    if isinstance(node.meta["value"], tuple):
        results = sorted(node.users, key=lambda user: str(user.args[1]))
        for user in results:
            names.use(user)
        if len(results) < len(node.meta["value"]):  # the others are dropped at once
            assert len(results) == 1, f"{node} has results between those used"
            index = f"[{results[0].args[1]}]"
    assigned = ", ".join([names.bind(result) for result in results])
    function = f"comm.{op}" if op in COLLECTIVES else op
    lines = [Line(layer, _wrapped(f"{assigned} = {function}(", args, f"){index}"))]
    gone = names.unbind(node.meta["frees"])
    if gone:
        lines.append(Line(layer, f"del {', '.join(gone)}"))
    return lines


def _argument(arg: Any, names: _Names, layer: int | None) -> str:
    if not isinstance(arg, fx.Node):
        return repr(arg)
    if arg.op != "get_attr":
        return names.text[arg]
    if arg.target == INV_FREQ:
        return "inv_freq_H2"
    name = str(arg.target).replace(f"layers.{layer}.", "layers.{i}.")
    return f'weights["{name}"]'


def _wrapped(head: str, args: list[str], tail: str) -> str:
    """A call on one line where it fits into the deepest block, else one argument a line."""
    line = f"{head}{', '.join(args)}{tail}"
    if len(line) + len(12 * " ") + len("f - 99") <= WIDTH:
        return line
    return "\n".join([head, *(f"    {arg}," for arg in args), tail])


# --- layers ---------------------------------------------------------------------------------------


def _body(lines: list[Line], first: int, end: int) -> list[str]:
    """The statements with equal layers rolled into a loop, or as they are where layers differ."""
    blocks = [[line.text for line in lines if line.layer == layer] for layer in range(first, end)]
    straight = [line.alone(first) for line in lines]
    alike = len(blocks) > 1 and all(block == blocks[1] for block in blocks[2:])
    shared = _common_end(blocks[0], blocks[1]) if alike else 0
    if not alike or 2 * shared < len(blocks[1]):
        return straight
    start = next(at for at, line in enumerate(lines) if line.layer is not None)
    count = sum(map(len, blocks))
    assert all(line.layer is not None for line in lines[start : start + count]), "layers in a row"
    loop = [_in_loop(text, first) for text in blocks[1]]
    opening, shared_lines = loop[: len(loop) - shared], loop[len(loop) - shared :]
    other = [_in_loop(text, first) for text in blocks[0][: len(blocks[0]) - shared]]
    inner = shared_lines
    if other or opening:
        inner = [f"if i == {first}:", *_indented(other or ["pass"]), *inner]
        if opening:
            inner[1 + max(len(other), 1) : 1 + max(len(other), 1)] = ["else:", *_indented(opening)]
    return [
        *straight[:start],
        f"for i in {_range(first, end)}:",
        *_indented(inner),
        *straight[start + count :],
    ]


def _range(first: int, end: int) -> str:
    return f"range({first}, {end})" if first else f"range({end})"


def _common_end(left: list[str], right: list[str]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[-1 - count] == right[-1 - count]:
        count += 1
    return count


def _indented(texts: list[str]) -> list[str]:
    return [textwrap.indent(text, "    ") for text in texts]


# --- parameters -----------------------------------------------------------------------------------


def _parameters(graph: fx.Graph, first: int, end: int) -> str:
    """The literal from which the runtime learns which tensors to load."""
    found: dict[str, tuple[int | None, Parameter]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target != INV_FREQ:
            parameter = node.meta["parameter"]
            found[parameter.name] = (node.meta["layer"], parameter)
    blocks = [
        [_parameter(each, layer) for at, each in found.values() if at == layer]
        for layer in range(first, end)
    ]
    alike = len(blocks) > 1 and all(block == blocks[0] for block in blocks)
    rows = [_parameter(each, None) for layer, each in found.values() if layer is None]
    if alike:
        head = ["*(", "    parameter", f"    for i in {_range(first, end)}"]
        inner = _indented(_indented(blocks[0]))
        rows += [*head, "    for parameter in (", *inner, "    )", "),"]
    else:
        rows += [_parameter(each, None) for layer, each in found.values() if layer is not None]
    return "\n".join(["PARAMETERS = (", *_indented(rows), ")\n"])


def _parameter(parameter: Parameter, layer: int | None) -> str:
    """One row; inside a loop over layers names are format strings over i."""
    mark = f"layers.{layer}."

    def named(name: str) -> str:
        prefix = "f" if mark in name else ""
        return f'{prefix}"{name.replace(mark, "layers.{i}.")}"'

    rows = [
        "{",
        f'    "name": {named(parameter.name)},',
        f'    "shape": {parameter.shape!r},',
        f'    "dtype": "{parameter.dtype}",',
        '    "sources": (',
    ]
    for source in parameter.sources:
        rows += [
            "        {",
            f'            "name": {named(source.name)},',
            f'            "shape": {source.shape!r},',
            f'            "shard_dim": {source.shard_dim!r},',
            f'            "shards": {source.shards!r},',
            "        },",
        ]
    return "\n".join([*rows, "    ),", "},"])


def _frequencies(plan: Plan) -> str:
    """The rotary frequencies as numbers; one tensor a device, made on the first step."""
    numbers = ", ".join(map(repr, inverse_frequencies(plan.model.rope, plan.model.head_dim)))
    rows = textwrap.fill(f"{numbers},", WIDTH - 4, break_long_words=False)
    return (
        f"INV_FREQ_H2 = (\n{textwrap.indent(rows, '    ')}\n)\n\n"
        "@functools.cache\n"
        "def frequencies(device):\n"
        '    """Radians per position of each pair of a head\'s elements, fp32 [H / 2]."""\n'
        "    return torch.tensor(INV_FREQ_H2, dtype=torch.float32, device=device)\n"
    )
