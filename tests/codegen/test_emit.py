"""What emission writes: readable, self-contained, the same bytes each time."""

import ast
import sys
from pathlib import Path

import msgspec
import pytest
from builders import make_plan, sixteen_gpu_plan, tiny_model

from codegen.emit import EXCHANGE, EmittedProgram, default_target, emit_program
from codegen.kernels import KERNELS, load_spec
from plans.mesh import Parallelism
from plans.ops import Parameter
from plans.plan import Plan


@pytest.fixture(scope="module")
def large() -> tuple[Plan, EmittedProgram]:
    plan = sixteen_gpu_plan()
    return plan, emit_program(plan)


def imported(source: bytes) -> set[str]:
    """Top-level modules; relative ones with a leading dot."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names.add(f"{'.' * node.level}{module}" if node.level else module.split(".")[0])
    return names


@pytest.mark.parametrize("target", ["torch", "triton"])
def test_files_import_only_numpy_torch_triton_and_siblings(target):
    files = emit_program(make_plan(), target=target).files
    siblings = {f".{Path(path).stem}" for path in files}
    allowed = {"numpy", "torch", "triton", *siblings, *sys.stdlib_module_names}
    for path, source in files.items():
        assert imported(source) <= allowed, path


def test_the_same_plan_gives_the_same_bytes():
    plan = make_plan(parallelism=Parallelism(tp=2, spp=2))
    assert emit_program(plan) == emit_program(plan)


def test_a_million_token_plan_is_emitted_in_loops(large):
    plan, program = large
    for stage, (first, end) in enumerate(plan.stages):
        source = program.files[f"program/stage_{stage}.py"].decode()
        layers = f"{first}, {end}" if first else f"{end}"
        assert source.count(f"for i in range({layers}):") == 1
        assert len(source.splitlines()) < 400


def test_lines_fit_into_the_width_of_the_project(large):
    for path, source in large[1].files.items():
        assert max(map(len, source.decode().splitlines())) <= 100, path


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("stages", [1, 2])
def test_stages_of_any_length_compile(layers, stages):
    plan = make_plan(model=tiny_model(layers=layers * stages), parallelism=Parallelism(spp=stages))
    for path, source in emit_program(plan).files.items():
        compile(source, path, "exec")


def test_parameters_hold_the_whole_model_once(large):
    """Shares of all ranks add up to the catalog's count; whole tensors count once."""
    plan, program = large
    total, norms = 0, 0
    for stage in range(len(plan.stages)):
        for parameter in parameters_of(program, stage):
            for source in parameter.sources:
                count = 1
                for dim in source.shape:
                    count *= dim
                total += count
                norms += len(source.shape) == 1
    assert total == plan.model.parameters
    assert norms == 2 * plan.model.layers + 1


def parameters_of(program: EmittedProgram, stage: int) -> tuple[Parameter, ...]:
    tree = ast.parse(program.files[f"program/stage_{stage}.py"])
    (rows,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PARAMETERS"
    )
    value = eval(compile(ast.Expression(rows), "PARAMETERS", "eval"))
    return msgspec.convert(value, tuple[Parameter, ...])


def test_rank_shares_join_to_the_source(large):
    plan, program = large
    for parameter in parameters_of(program, 0):
        rows = 0
        for source in parameter.sources:
            piece = parameter.source_slice(source, plan.parallelism.tp, plan.parallelism.tp - 1)
            shape = tuple(
                len(range(size)[part]) for size, part in zip(source.shape, piece, strict=True)
            )
            assert shape[1:] == parameter.shape[1:]
            rows += shape[0]
        assert rows == parameter.shape[0]


def test_kernels_name_every_op_file_and_its_tunables(large):
    program = large[1]
    called = {
        name.removeprefix(".")
        for path, source in program.files.items()
        if Path(path).stem.startswith("stage_")
        for name in imported(source)
    }
    ops = {path for path in program.files if Path(path).stem in called}
    assert {kernel.file for kernel in program.kernels} == ops
    assert {kernel.op for kernel in program.kernels} <= {*KERNELS}
    by_op = {kernel.op: kernel for kernel in program.kernels}
    assert by_op["all_reduce_add_rms_norm"].target == by_op["rms_norm"].target == "triton"
    assert by_op["linear"].target == "torch"  # of steps of many tokens
    assert by_op["rms_norm"].params == load_spec("rms_norm").params


def test_products_have_a_way_for_few_tokens_and_one_for_many(large):
    rows = {
        (kernel.op, kernel.when.tokens_max): kernel
        for kernel in large[1].kernels
        if kernel.op in {"linear", "gate_up_silu", "qkv_rope_write"}
    }
    assert {tokens for _, tokens in rows} == {64, None}
    for op in ("linear", "gate_up_silu", "qkv_rope_write"):
        few = rows[op, 64]
        assert few.target == "triton"
        assert few.params == {name: load_spec(op).params[name] for name in few.params}
        assert few.params["TOKENS_MAX"] == few.when.tokens_max
    assert rows["linear", None].target == "torch"


def test_the_norm_behind_a_sum_over_ranks_brings_the_kernel_of_larger_steps(large):
    plan, program = large
    assert plan.parallelism.tp > 1
    own = load_spec("all_reduce_add_rms_norm").params
    rows = [each for each in program.kernels if each.op == "all_reduce_add_rms_norm"]
    assert [each.when.tokens_max for each in rows] == [own["TOKENS_MAX"], None]
    assert rows[0].params == own
    assert b"from .add_rms_norm_triton import" in program.files[rows[0].file]
    assert "program/add_rms_norm_triton.py" in program.files
    alone = emit_program(make_plan(), target="triton").files
    assert "program/all_reduce_add_rms_norm.py" not in alone


def test_tuned_bounds_are_those_of_the_file():
    plan = sixteen_gpu_plan()
    program = emit_program(plan, params={"linear": {"TOKENS_MAX": 16}})
    bounds = [kernel.when.tokens_max for kernel in program.kernels if kernel.op == "linear"]
    assert bounds == [16, None]
    assert b"TOKENS_MAX = 16\n" in program.files["program/linear.py"]


def test_the_target_follows_the_device():
    assert default_target(make_plan()) == "torch"
    assert default_target(sixteen_gpu_plan()) == "triton"
    assert all(kernel.target == "torch" for kernel in emit_program(make_plan()).kernels)


@pytest.mark.parametrize("target", ["torch", "triton", "flash_attn"])
def test_the_last_stage_of_a_program_of_our_kernels_hands_on_the_sampler(target):
    program = emit_program(make_plan(parallelism=Parallelism(spp=2)), target=target)
    ours = target != "torch"
    assert ("program/sample.py" in program.files) == ours
    assert ("program/sample_tiles.py" in program.files) == ours
    assert [kernel.target for kernel in program.kernels if kernel.op == "sample"] == (
        ["triton"] if ours else []
    )
    for stage, expected in enumerate((False, ours)):
        source = program.files[f"program/stage_{stage}.py"]
        assert (b"SAMPLE = sample\n" in source) == expected


@pytest.mark.parametrize("target", ["torch", "triton", "flash_attn"])
@pytest.mark.parametrize(
    ("kvp", "head_dim", "merges"), [(1, 64, False), (2, 64, True), (2, 48, False)]
)
def test_every_stage_of_kvp_groups_hands_on_the_kernels_of_their_exchange(
    target, kvp, head_dim, merges
):
    """Where the target is ours and heads are a power of two; else the runtime has its own way."""
    model = tiny_model(layers=2, head_dim=head_dim)
    plan = make_plan(model=model, parallelism=Parallelism(spp=2, kvp=kvp))
    program = emit_program(plan, target=target)
    ours = merges and target != "torch"
    for op in EXCHANGE:
        assert (f"program/{op}.py" in program.files) == ours
        assert any(kernel.op == op for kernel in program.kernels) == ours
    assert ("program/kvp_pack_places.py" in program.files) == ours
    for stage in range(2):
        source = program.files[f"program/stage_{stage}.py"]
        assert (b"EXCHANGE = kvp_pack, kvp_merge\n" in source) == ours
    if ours:
        merge = program.files["program/kvp_merge.py"]
        assert b"from .kvp_pack_places import aligned, entry_of\n" in merge


@pytest.mark.parametrize(
    ("name", "changes", "degrees"),
    [
        ("tiny_llama", {}, Parallelism()),
        ("tiny_qwen3_tp2_spp2_kvp2", {"qk_norm": True}, Parallelism(tp=2, spp=2, kvp=2)),
    ],
)
def test_programs_are_as_recorded(name, changes, degrees, golden):
    plan = make_plan(model=tiny_model(layers=6, **changes), parallelism=degrees)
    program = emit_program(plan)
    for stage in range(len(plan.stages)):
        golden(f"{name}_stage_{stage}.txt", program.files[f"program/stage_{stage}.py"].decode())
