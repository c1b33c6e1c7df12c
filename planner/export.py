"""Launch scripts for a plan: our own runtime under torchrun, vLLM, SGLang; one script a node.

Each script is written from the plan alone, names in a comment what its engine cannot express, and
takes what differs from place to place (model, addresses, ports) from the environment. Flags are
read back from the finished text and compared with the plan before anything is returned.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from planner.catalog import hub_id
from planner.engine_flags import (
    EngineFlags,
    Exported,
    Words,
    memory_share,
    read_sglang,
    read_vllm,
    sglang_flags,
    vllm_flags,
)
from plans.codec import content_hash
from plans.errors import MedhaError, UnknownName
from plans.plan import Plan
from plans.workload import length_at

ENGINES = ("sglang", "torchrun", "vllm")
PORT = 8000
"""Of the first server; further ones count on."""
MEETING_PORT = 29500
BENCH_LOAD = 0.8
"""Of the predicted capacity, in the benchmark script."""
BENCH_PROMPTS = 200


class ExportDiffers(MedhaError):
    """Scripts that would start something else than the plan: a bug of the exporter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Scripts of one engine."""

    engine: str
    files: dict[str, bytes]
    """launch/run_<node>.sh and launch/bench.sh."""
    lost: tuple[str, ...]
    """What the scripts cannot say of the plan, a sentence each."""

    @property
    def lost_lines(self) -> tuple[str, ...]:
        """The same for the terminal."""
        return tuple(f"not in the {self.engine} scripts: {each}" for each in self.lost)

    @property
    def builtins(self) -> dict[str, object]:
        """The same for --format json."""
        files = {name: text.decode() for name, text in self.files.items()}
        return {"launch": {"engine": self.engine, "files": files, "lost": self.lost}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One replica: its nodes in rank order, and the devices that it has on each."""

    replica: int
    devices: dict[int, tuple[int, ...]]


def export(plan: Plan, engine: str) -> Launch:
    """Scripts that start the plan on an engine.

    Raises UnknownName; MedhaError where the engine cannot start anything like the plan.
    """
    if engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    return _torchrun(plan) if engine == "torchrun" else _servers(plan, engine)


def servers(plan: Plan) -> tuple[Server, ...]:
    """Every replica with its nodes and devices."""
    size = plan.parallelism.ranks_per_replica
    found = []
    for replica in range(plan.parallelism.replicas):
        devices: dict[int, tuple[int, ...]] = {}
        for node, device in plan.placement.rank_map[replica * size : (replica + 1) * size]:
            devices[node] = (*devices.get(node, ()), device)
        found.append(Server(replica=replica, devices=devices))
    return tuple(found)


def read_script(text: str) -> Iterator[Words]:
    """Flags of every server that a script starts, in order."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        if not re.match(r"\s*(?:\w+=\S+\s+)*(?:vllm serve|python3 -m sglang|torchrun)", line):
            continue
        words = shlex.split(line.removesuffix("&"))
        flags: Words = {}
        for place, word in enumerate(words):
            if word.startswith("--"):
                after = words[place + 1 : place + 2]
                flags[word] = after[0] if after and not after[0].startswith("--") else ""
        yield flags


def _torchrun(plan: Plan) -> Launch:
    """medha-run: directly on one node, by torchrun on each of several."""
    nodes: dict[int, int] = {}
    for node, _ in plan.placement.rank_map:
        nodes[node] = nodes.get(node, 0) + 1
    lost: tuple[str, ...] = ()
    if not plan.files:
        lost = ("the plan has no program (--no-kernels, or a model that none can be made for yet)",)
    arguments = (
        '"$BUNDLE" --weights "$WEIGHTS" --requests "$REQUESTS"',
        '--out "$ANSWERS"',
    )
    files = {}
    head = next(iter(nodes))
    for place, (node, ranks) in enumerate(nodes.items()):
        lines = [
            'BUNDLE="${BUNDLE:-$(dirname "$0")/..}"',
            'WEIGHTS="${WEIGHTS:?folder of the checkpoint, or random}"',
            'REQUESTS="${REQUESTS:?JSON lines, one request each}"',
            'ANSWERS="${ANSWERS:-answers.jsonl}"',
        ]
        if len(nodes) == 1:
            lines += ["medha-run " + " \\\n  ".join(arguments)]
        else:
            lines += [
                _head_line(head),
                f"torchrun --nnodes {len(nodes)} --node-rank {place} --nproc-per-node {ranks} \\\n"
                f'  --master-addr "$HEAD_ADDR_{head}" \\\n'
                f'  --master-port "${{MASTER_PORT:-{MEETING_PORT}}}" \\\n'
                "  -m runtime.cli_run " + " \\\n  ".join(arguments),
            ]
        title = f"medha-run, node {node} of the plan ({ranks} ranks)"
        files[f"launch/run_{node}.sh"] = _script(plan, title, lost, lines)
    rate = plan.predicted.capacity_rps * BENCH_LOAD
    bench = [
        'BUNDLE="${BUNDLE:-$(dirname "$0")/..}"',
        f'medha-sim "$BUNDLE" --qps "${{QPS:-{rate:.4g}}}" --duration "${{DURATION_S:-600}}"',
    ]
    files["launch/bench.sh"] = _script(plan, "the workload in virtual time", (), bench)
    launch = Launch(engine="torchrun", files=files, lost=lost)
    if len(nodes) > 1:
        told = [flags for text in files.values() for flags in read_script(text.decode())]
        ranks_told = sum(int(flags["--nproc-per-node"]) for flags in told)
        _same("torchrun", ranks=(ranks_told, plan.parallelism.ranks))
    return launch


def _servers(plan: Plan, engine: str) -> Launch:
    """A server for each replica, on each of its nodes."""
    flags: EngineFlags = {"vllm": vllm_flags, "sglang": sglang_flags}[engine](plan)
    every = servers(plan)
    ranks = _ranks(plan, engine, flags)
    lost = flags.lost
    starts: dict[int, list[str]] = {}
    for server in every:
        devices = _used(server, ranks)
        if len({len(each) for each in devices.values()}) > 1:
            counts = ", ".join(f"{len(each)} on node {node}" for node, each in devices.items())
            raise MedhaError(
                f"{engine} starts equally many ranks on each node of a server, and replica"
                f" {server.replica} has {counts}; nearest: --export torchrun"
            )
        for place, (node, here) in enumerate(devices.items()):
            words = flags.words | _NODES[engine](server, len(devices), place)
            start = _start(engine, words, flags.environment, here)
            starts.setdefault(node, []).append(start)
    files = {}
    for node, commands in sorted(starts.items()):
        lines = [f'MODEL="${{MODEL:-{hub_id(plan.model.name) or plan.model.name}}}"']
        heads = sorted({int(head) for head in re.findall(r"\$HEAD_ADDR_(\d+)", " ".join(commands))})
        lines += [_head_line(head) for head in heads]
        lines += [f"{command} &" for command in commands[:-1]] + [commands[-1]]
        lines += ["wait"] * (len(commands) > 1)
        files[f"launch/run_{node}.sh"] = _script(
            plan, f"{_TITLES[engine]}, node {node}", lost, lines
        )
    _verify(plan, engine, ranks, files)
    bench = _bench(plan, engine, _READERS[engine](flags.words).context_tokens)
    files["launch/bench.sh"] = _script(plan, _TITLES[engine], (), bench)
    return Launch(engine=engine, files=files, lost=lost)


def _ranks(plan: Plan, engine: str, flags: EngineFlags) -> int:
    """Ranks of one server."""
    read = _READERS[engine](flags.words)
    return read.tensor * read.spp


def _used(server: Server, ranks: int) -> dict[int, tuple[int, ...]]:
    """Devices of a server, in rank order, as many as it has ranks."""
    left, used = ranks, {}
    for node, devices in server.devices.items():
        if left:
            used[node] = devices[:left]
            left -= len(used[node])
    return used


def _start(engine: str, words: Words, environment: Words, devices: tuple[int, ...]) -> str:
    """The command that starts one server, or its part on one node."""
    program = {
        "vllm": 'vllm serve "$MODEL"',
        "sglang": 'python3 -m sglang.launch_server --model-path "$MODEL"',
    }[engine]
    visible = ",".join(map(str, devices))
    settings = {"CUDA_VISIBLE_DEVICES": visible} | environment
    before = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    options = [f"{flag} {_quoted(value)}".strip() for flag, value in words.items()]
    return " \\\n  ".join([f"{before} {program}", *options])


def _quoted(value: str) -> str:
    return f'"{value}"' if value.startswith("$") else shlex.quote(value) if value else ""


def _vllm_nodes(server: Server, nodes: int, place: int) -> Words:
    port = {"--port": str(PORT + server.replica)}
    if nodes == 1:
        return port
    head = next(iter(server.devices))
    meeting = {
        "--nnodes": str(nodes),
        "--node-rank": str(place),
        "--master-addr": f"$HEAD_ADDR_{head}",
        "--master-port": str(MEETING_PORT + server.replica),
    }
    return meeting | (port if place == 0 else {"--headless": ""})


def _sglang_nodes(server: Server, nodes: int, place: int) -> Words:
    words = {"--host": "0.0.0.0", "--port": str(PORT + server.replica)}  # noqa: S104
    if nodes == 1:
        return words
    head = next(iter(server.devices))
    address = f"$HEAD_ADDR_{head}:{MEETING_PORT + server.replica}"
    return words | {
        "--nnodes": str(nodes),
        "--node-rank": str(place),
        "--dist-init-addr": address,
    }


def _head_line(head: int) -> str:
    return f'HEAD_ADDR_{head}="${{HEAD_ADDR_{head}:?address of node {head}}}"'


def _bench(plan: Plan, engine: str, context_tokens: int) -> list[str]:
    """The plan's workload class by class, at the medians of its lengths."""
    program = {
        "vllm": 'vllm bench serve --backend vllm --model "$MODEL"',
        "sglang": 'python3 -m sglang.bench_serving --backend sglang --model "$MODEL"',
    }[engine]
    rate = plan.predicted.capacity_rps * BENCH_LOAD / plan.parallelism.replicas
    lines = [
        f'MODEL="${{MODEL:-{hub_id(plan.model.name) or plan.model.name}}}"',
        'HOST="${HOST:-127.0.0.1}"',
        f'PORT="${{PORT:-{PORT}}}"',
    ]
    for each in plan.workload.classes:
        prompt = min(length_at(each.input_tokens, 0.5), max(context_tokens - 1, 1))
        answer = max(min(length_at(each.output_tokens, 0.5), context_tokens - prompt), 1)
        count = max(round(BENCH_PROMPTS * each.share), 1)
        lines.append(
            f'{program} --host "$HOST" --port "$PORT" --dataset-name random \\\n'
            f"  --random-input-len {prompt} --random-output-len {answer} \\\n"
            f"  --num-prompts {count} --request-rate {rate * each.share:.4g} &"
            f"  # {each.name.replace(chr(10), ' ')}"
        )
    return [*lines, "wait"]


def _script(plan: Plan, title: str, lost: tuple[str, ...], lines: list[str]) -> bytes:
    p = plan.parallelism
    head = [
        "#!/usr/bin/env bash",
        f"# {plan.name}: {title}. Plan {content_hash(plan)[:12]}:",
        f"# tp {p.tp} x spp {p.spp} x kvp {p.kvp} x replicas {p.replicas}, idle {p.idle}.",
    ]
    if lost:
        head += ["# Not in these flags:", *(f"# - {each}" for each in lost)]
    return "\n".join([*head, "set -euo pipefail", *lines]).encode() + b"\n"


def _verify(plan: Plan, engine: str, ranks: int, files: dict[str, bytes]) -> None:
    """Reads the scripts back; what they would start is what the plan and its losses say."""
    counted: dict[str, int] = {}
    for text in files.values():
        for words in read_script(text.decode()):
            read = _READERS[engine](words)
            p = plan.parallelism
            _same(
                engine,
                tensor=(read.tensor, p.tp if read.tensor == p.tp else p.tp * p.kvp),
                spp=(read.spp, p.spp),
                sequences=(read.sequences, plan.limits.sequences),
                chunk=(read.chunk_tokens, plan.prefill.chunks[0].chunk_tokens),
                page=(read.page_tokens, plan.kv.page_tokens),
                memory=(read.memory_share, memory_share(plan, engine)),
                ranks=(read.tensor * read.spp, ranks),
            )
            if read.context_tokens > plan.limits.context_tokens:
                _same(engine, context=(read.context_tokens, plan.limits.context_tokens))
            port = words.get("--port", "")
            counted[port] = counted.get(port, 0) + 1
    served = {port for port in counted if port}
    _same(engine, replicas=(len(served), plan.parallelism.replicas))


def _same(engine: str, **pairs: tuple[float, float]) -> None:
    for name, (told, wanted) in pairs.items():
        if told != wanted:
            raise ExportDiffers(
                f"the {engine} scripts say {name} {told}, the plan {wanted} (a bug of the exporter)"
            )


_READERS: dict[str, Callable[[Words], Exported]] = {"vllm": read_vllm, "sglang": read_sglang}
_NODES = {"vllm": _vllm_nodes, "sglang": _sglang_nodes}
_TITLES = {"vllm": "vLLM 0.11.1 or later", "sglang": "SGLang 0.5.7 or later"}
