"""Prints the graph of one stage as a Python module.

The straight-line program is printed first, each line with the layer it belongs to and with `{i}` in
place of that layer's number. Where all layers' lines are then the same text, they become one loop:
the loop is by construction the straight-line program rolled up. The first layer may begin otherwise
(it has no residual add to fuse), which becomes an `if`.
"""

import operator
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import fx

from codegen.graph import COLLECTIVES, INV_FREQ, op_name
from codegen.models.frequencies import inverse_frequencies
from plans.ops import Parameter
from plans.plan import Plan

WIDTH = 100
PLACEHOLDERS = ("token_ids_T", "positions_T", "slots_T", "sample_rows_R")


@dataclass(frozen=True)
class Line:
    """A statement; `{i}` stands for the number of its layer."""

    layer: int | None
    text: str

    def expanded(self) -> str:
        """The statement of this very layer."""
        return self.text.replace("{i}", str(self.layer))


def stage_source(graph: fx.Graph, *, plan: Plan, stage: int, peak_bytes: int) -> str:
    """The module of one stage; `peak_bytes` goes into its docstring."""
    first, end = plan.stages[stage]
    degrees = plan.parallelism
    rotary = any(node.target == INV_FREQ for node in graph.nodes)
    ops = {op for node in graph.nodes if (op := op_name(node)) and op not in COLLECTIVES}
    imports = [f"from .{op} import {op}" for op in sorted(ops)]
    body = _body(_statements(graph, first), first, end)
    if rotary:
        body.insert(0, "inv_freq_H2 = frequencies(inputs.positions_T.device)")
    result = f"hidden_TD, layers {first} to {end - 1} done" if end < plan.model.layers else (
        "logits_RV in fp32 over the whole vocabulary"
    )  # fmt: skip
    parts = [
        f'"""Stage {stage} of {len(plan.stages)}: layers {first} to {end - 1} of '
        f"{plan.model.name}, at tp {degrees.tp}, kvp {degrees.kvp}.\n\n"
        "T tokens of the step, R sampled rows, D hidden, N query heads, K KV heads, H head size,\n"
        "O outputs of a projection, F ffn, V vocabulary; N, K, O, F and V are one rank's share.\n"
        f"At {plan.scheduler.max_step_tokens} tokens at most {peak_bytes / 2**20:.1f} MiB of values"
        f' are alive.\n"""\n',
        *(["import functools\n"] if rotary else []),
        "import torch\n",
        "\n".join(imports) + "\n",
        _parameters(graph, first, end),
        *([_frequencies(plan)] if rotary else []),
        f'def forward(weights, inputs, kv, comm):\n    """Runs one step; returns {result}."""\n'
        + textwrap.indent("\n".join(body), "    ")
        + "\n",
    ]
    text = "\n".join(parts)
    for name in ("\nPARAMETERS", "\n@functools", "\ndef forward"):
        text = text.replace(name, f"\n{name}")
    return text


# --- statements -----------------------------------------------------------------------------------


def _statements(graph: fx.Graph, first: int) -> list[Line]:
    """The straight-line program."""
    lines: list[Line] = []
    names: dict[fx.Node, str] = {}
    bound: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            _bind_placeholder(node, names, bound, lines)
        elif node.op == "output":
            lines.append(Line(None, f"return {names[node.args[0]]}"))
        elif node.op == "call_function" and node.target is not operator.getitem:
            lines += _call_lines(node, names, bound, first)
    return lines


def _bind_placeholder(
    node: fx.Node, names: dict[fx.Node, str], bound: dict[str, fx.Node], lines: list[Line]
) -> None:
    target = str(node.target)
    if target in PLACEHOLDERS:
        names[node] = f"inputs.{target}"
    elif target == "hidden_TD":
        names[node] = node.meta["name"]
        bound[node.meta["name"]] = node
        lines.append(Line(None, f"{names[node]} = inputs.hidden_TD"))
    elif target == "inputs":
        names[node] = target
    else:  # k_pages_3
        side, layer = target.rsplit("_", 1)
        names[node] = f"kv.{side}[{layer}]"


def _call_lines(
    node: fx.Node, names: dict[fx.Node, str], bound: dict[str, fx.Node], first: int
) -> list[Line]:
    """The call, and a `del` of what it was the last to read and no new name covers."""
    layer = node.meta["layer"]
    op = op_name(node)
    assert op is not None, f"{node} calls nothing"
    args = [_argument(each, names, layer, first) for each in node.args]
    freed = [names[each] for each in node.meta["frees"] if each in names]
    for name in freed:
        bound.pop(name, None)
    results: list[fx.Node] = [node]
    index = ""
    if isinstance(node.meta["value"], tuple):
        results = sorted(node.users, key=lambda user: user.args[1])
        if len(results) < len(node.meta["value"]):  # the others are dropped at once
            assert len(results) == 1, f"{node} has results between those used"
            index = f"[{results[0].args[1]}]"
    assigned = []
    for result in results:
        name = _free_name(result.meta["name"], bound)
        names[result], bound[name] = name, result
        assigned.append(name)
    function = f"comm.{op}" if op in COLLECTIVES else op
    lines = [Line(layer, _wrapped(f"{', '.join(assigned)} = {function}(", args, f"){index}"))]
    unbound = sorted({name for name in freed if name not in bound})
    if unbound:
        lines.append(Line(layer, f"del {', '.join(unbound)}"))
    return lines


def _free_name(wanted: str, bound: dict[str, fx.Node]) -> str:
    """The wanted name, or one with a number if a value that is still read has it."""
    name, number = wanted, 2
    while name in bound:
        name, number = f"{wanted}_{number}", number + 1
    return name


def _argument(arg: Any, names: dict[fx.Node, str], layer: int | None, first: int) -> str:
    if not isinstance(arg, fx.Node):
        return repr(arg)
    if arg.op == "get_attr":
        if arg.target == INV_FREQ:
            return "inv_freq_H2"
        name = str(arg.target).replace(f"layers.{layer}.", "layers.{i}.")
        return f'weights[{"f" if "{i}" in name else ""}"{name}"]'
    text = names[arg]
    if layer is not None and text.startswith("kv."):
        index = "{i}" if first == 0 else f"{{i}} - {first}"
        return text.replace(f"[{layer - first}]", f"[{index}]")
    return text


def _wrapped(head: str, args: list[str], tail: str, indent: int = 12) -> str:
    """A call on one line where it fits into the deepest block, else one argument a line."""
    line = f"{head}{', '.join(args)}{tail}"
    if len(line) + indent <= WIDTH:
        return line
    return "\n".join([head, *(f"    {arg}," for arg in args), tail])


# --- layers ---------------------------------------------------------------------------------------


def _body(lines: list[Line], first: int, end: int) -> list[str]:
    """The statements with equal layers rolled into a loop, or as they are where layers differ."""
    blocks = [[line.text for line in lines if line.layer == layer] for layer in range(first, end)]
    before = [line.expanded() for line in _head(lines)]
    after = [line.expanded() for line in lines[len(before) + sum(map(len, blocks)) :]]
    alike = len(blocks) > 1 and all(block == blocks[1] for block in blocks[2:])
    shared = _common_end(blocks[0], blocks[1]) if alike else 0
    if not alike or 2 * shared < len(blocks[1]):
        return [line.expanded().replace('f"', '"') for line in lines]
    loop = [text.replace("{i}", "i") if "kv." in text else text for text in blocks[1]]
    opening, rest = loop[: len(loop) - shared], loop[len(loop) - shared :]
    start = blocks[0][: len(blocks[0]) - shared]
    if start or opening:
        rest = [f"if i == {first}:", *_indented(start), *(["else:", *_indented(opening)] if opening else []), *rest]
    return [*before, f"for i in range({first}, {end}):", *_indented(rest), *after]


def _head(lines: list[Line]) -> list[Line]:
    """Lines before the first layer."""
    count = next((at for at, line in enumerate(lines) if line.layer is not None), len(lines))
    return lines[:count]


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
        inner = _indented(_indented(blocks[0]))
        rows += ["*(", "    parameter", f"    for i in range({first}, {end})", "    for parameter in (",
                 *inner, "    )", "),"]  # fmt: skip
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
