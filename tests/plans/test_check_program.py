"""A program beside a plan: the right files, the plan's ops and tunables, made for this model."""

import hashlib

import msgspec
import pytest
from builders import make_plan, tiny_model

from plans.check_program import MADE_FOR, made_for, program_problems, read_program
from plans.mesh import Parallelism
from plans.plan import Kernel, When

FILES = {
    "program/stage_0.py": b"import torch\n\nfrom .linear import linear\nfrom .silu import silu\n",
    "program/linear.py": b"from .linear_core import go\n\nBLOCK = 64\n",
    "program/linear_core.py": b"WARPS = 4\n",
    "program/silu.py": b"",
}
ROWS = (
    Kernel(
        op="linear",
        when=When(tokens_max=64),
        target="triton",
        params={"BLOCK": 64},
        file="program/linear.py",
    ),
    Kernel(op="linear", target="torch", file="program/linear.py"),
    Kernel(op="silu", target="torch", file="program/silu.py"),
)


def plan_with(rows=ROWS, **parts):
    plan = make_plan(**parts)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    return msgspec.structs.replace(plan, kernels=rows, files=digests)


def row(at, **changes):
    changed = list(ROWS)
    changed[at] = msgspec.structs.replace(ROWS[at], **changes)
    return tuple(changed)


def test_a_program_that_fits_has_no_problem():
    assert list(program_problems(plan_with(), FILES)) == []
    assert list(program_problems(plan_with(), FILES | {MADE_FOR: made_for(plan_with())})) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[:2], "no row of silu"),
        ((), "no row of linear"),
        (
            (*ROWS, Kernel(op="linear_core", target="torch", file="program/linear_core.py")),
            "kernels[3].op: 'linear_core' is called by no stage",
        ),
        (row(0, params={"BLOCK": 32}), "program/linear.py was made with 64"),
        (row(0, params={"BLOK": 64}), "kernels[0].params.BLOK: no constant of program/linear.py"),
    ],
)
def test_rows_that_are_not_the_programs_are_named(rows, said):
    assert any(said in each for each in program_problems(plan_with(rows), FILES))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": tiny_model(vocab=128)}, "model.vocab: 128, the program was made for 256"),
        ({"model": tiny_model(norm_eps=0.5)}, "model.norm_eps: 0.5"),
        ({"kv_dtype": "bf16"}, "kv.dtype: bf16"),
        ({"parallelism": Parallelism(tp=2)}, "parallelism.tp: 2, the program was made for 1"),
        ({"parallelism": Parallelism(spp=2)}, "program/stage_1.py: not part of the program"),
    ],
)
def test_a_program_of_another_plan_is_named_by_the_field(parts, said):
    files = FILES | {MADE_FOR: made_for(make_plan())}
    assert any(said in each for each in program_problems(plan_with(**parts), files))


def test_names_and_context_limits_do_not_change_a_program():
    other = make_plan(model=tiny_model(name="other", context_limit=2048), name="another")
    assert made_for(other) == made_for(make_plan())


def test_files_that_miss_or_changed_are_listed(tmp_path):
    plan = plan_with()
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_program(tmp_path, plan.files) == (FILES, [])
    (tmp_path / "program/silu.py").unlink()
    (tmp_path / "program/linear.py").write_bytes(b"BLOCK = 32\n")
    contents, problems = read_program(tmp_path, plan.files)
    assert sorted(contents) == ["program/linear_core.py", "program/stage_0.py"]
    assert [each.partition(" ")[0] for each in problems] == [
        "program/linear.py:",
        "program/silu.py:",
    ]


def test_a_program_that_does_not_say_its_model_shows_its_vocabulary():
    row = b'{"name": "model.embed_tokens.weight", "shape": (256, 64), "shard_dim": 0}\n'
    files = FILES | {"program/stage_0.py": FILES["program/stage_0.py"] + row}
    assert list(program_problems(plan_with(), files)) == []
    (problem,) = program_problems(plan_with(model=tiny_model(vocab=128)), files)
    assert "model.embed_tokens.weight has 256 x 64 numbers" in problem
