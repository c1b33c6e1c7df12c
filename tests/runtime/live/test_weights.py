"""Weights: what a rank reads of a checkpoint, and the random model that every layout shares."""

import json
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import tiny_model

import runtime.weights
from plans.errors import BundleMismatch, UsageError
from plans.model import Model, RopeScaling
from plans.ops import Parameter, Source
from runtime.weights import (
    hugging_face_config,
    load_weights,
    random_tensor,
    random_weights,
    write_random_checkpoint,
)


def parameters_of(model: Model, *, tp: int = 1, fused: bool = True) -> list[Parameter]:
    """The parameters of a Llama-like model, its q, k, v and gate, up fused or not."""
    found = []

    def add(name: str, *sources: tuple[str, tuple[int, ...], int | None]) -> None:
        made = [
            Source(name=each, shape=shape, shard_dim=dim, shards=tp if dim is not None else 1)
            for each, shape, dim in sources
        ]
        shapes = [
            [size // each.shards if dim == each.shard_dim else size for dim, size in enumerate(row)]
            for each in made
            for row in [each.shape]
        ]
        rows = sum(shape[0] for shape in shapes)
        found.append(
            Parameter(
                name=name,
                shape=(rows, *shapes[0][1:]),
                dtype=model.weight_dtype,
                sources=tuple(made),
            )
        )

    def add_group(name: str, *sources: tuple[str, tuple[int, ...], int | None]) -> None:
        if fused:
            add(name, *sources)
        else:
            for source in sources:
                add(source[0], source)

    hidden, head = model.hidden, model.head_dim
    add("embedding", ("model.embed_tokens.weight", (model.vocab, hidden), 0))
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        add(f"{layer}.norm", (f"{at}.input_layernorm.weight", (hidden,), None))
        add_group(
            f"{layer}.qkv",
            (f"{at}.self_attn.q_proj.weight", (model.heads * head, hidden), 0),
            (f"{at}.self_attn.k_proj.weight", (model.kv_heads * head, hidden), 0),
            (f"{at}.self_attn.v_proj.weight", (model.kv_heads * head, hidden), 0),
        )
        add(f"{layer}.out", (f"{at}.self_attn.o_proj.weight", (hidden, model.heads * head), 1))
        add(f"{layer}.mlp_norm", (f"{at}.post_attention_layernorm.weight", (hidden,), None))
        add_group(
            f"{layer}.gate_up",
            (f"{at}.mlp.gate_proj.weight", (model.ffn, hidden), 0),
            (f"{at}.mlp.up_proj.weight", (model.ffn, hidden), 0),
        )
        add(f"{layer}.down", (f"{at}.mlp.down_proj.weight", (hidden, model.ffn), 1))
    add("norm", ("model.norm.weight", (hidden,), None))
    head_name = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    add("head", (head_name, (model.vocab, hidden), 0))
    return found


MODEL = tiny_model(layers=2, weight_dtype="fp32")
NAMED = {
    source.name: random_weights([parameter])[parameter.name]
    for parameter in parameters_of(MODEL, fused=False)
    for source in parameter.sources
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# --- random -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_every_layout_holds_the_same_random_model(tp, fused):
    for parameter in parameters_of(MODEL, tp=tp, fused=fused):
        for rank in range(tp):
            [found] = random_weights([parameter], tp=tp, tp_rank=rank).values()
            pieces = [
                NAMED[source.name][parameter.source_slice(source, tp, rank)]
                for source in parameter.sources
            ]
            assert torch.equal(found, torch.cat(pieces))


@given(st.data())
def test_a_slice_of_a_random_tensor_is_the_tensor_sliced(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    index = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        for size in shape
    )
    if any(part.start == part.stop for part in index):
        index = tuple(slice(None) for _ in shape)
    source = Source(name="w", shape=shape)
    assert torch.equal(random_tensor(source, index), random_tensor(source)[index])


def test_blocks_do_not_show_in_the_values(monkeypatch):
    source = Source(name="w", shape=(37, 5))
    whole = random_tensor(source)
    monkeypatch.setitem(runtime.weights.BLOCK_ELEMENTS, "cpu", 12)
    assert torch.equal(random_tensor(source), whole)


def test_a_random_matrix_has_mean_0_and_the_deviation_of_its_fan_in():
    """64 x 1024 draws: 6 standard errors, of the mean and of the variance of a uniform one."""
    values = random_tensor(Source(name="w", shape=(64, 1024))).double()
    deviation, draws = 1024**-0.5, values.numel()
    assert abs(values.mean()) < 6 * deviation / math.sqrt(draws)
    assert abs(values.var() / deviation**2 - 1) < 6 * math.sqrt(0.8 / draws)
    assert values.abs().max() <= deviation * math.sqrt(3)
    assert values.unique().numel() > 0.99 * draws


def test_names_shapes_and_seeds_give_different_values():
    tensors = [
        random_tensor(Source(name=name, shape=shape), seed=seed).flatten()
        for name, shape, seed in [
            ("a", (4, 8), 0),
            ("b", (4, 8), 0),
            ("a", (8, 4), 0),
            ("a", (4, 8), 1),
        ]
    ]
    values = torch.cat([each / each.abs().max() for each in tensors])
    assert values.unique().numel() > 0.9 * values.numel()


def test_norms_are_1():
    assert (random_tensor(Source(name="model.norm.weight", shape=(8,))) == 1).all()


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1 << 40, 50_000, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_random_checkpoint_loads_as_the_random_model(tmp_path, shard_bytes, dtype):
    model = tiny_model(layers=2, weight_dtype=dtype)
    write_random_checkpoint(tmp_path, model, parameters_of(model), shard_bytes=shard_bytes)
    for rank in range(2):
        parameters = parameters_of(model, tp=2)
        assert_same(
            load_weights(tmp_path, parameters, tp=2, tp_rank=rank),
            random_weights(parameters, tp=2, tp_rank=rank),
        )
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_a_random_checkpoint(tmp_path, tied):
    model = tiny_model(layers=2, weight_dtype="fp32", tie_embeddings=tied)
    parameters = parameters_of(model, fused=False)
    write_random_checkpoint(tmp_path, model, parameters, shard_bytes=50_000)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    state = read.state_dict()
    for parameter in parameters:
        expected = random_weights([parameter])[parameter.name]
        assert torch.equal(state[parameter.sources[0].name], expected)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
    ],
)
def test_the_written_configuration_is_one_of_transformers(changes, kind):
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context_tokens=256)
    model = tiny_model(**changes)
    rope = {"theta": 5000.0, "scaling": scaling}
    model = tiny_model(**changes, rope=type(model.rope)(**rope))
    written = hugging_face_config(model)
    config = transformers.AutoConfig.for_model(**{**written, "model_type": kind})
    assert written["model_type"] == kind
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.head_dim == model.head_dim


def test_a_folder_with_weights_is_never_written_over(tmp_path):
    write_random_checkpoint(tmp_path, MODEL, parameters_of(MODEL))
    with pytest.raises(UsageError, match="already holds weights"):
        write_random_checkpoint(tmp_path, MODEL, parameters_of(MODEL))


@pytest.fixture
def checkpoint(tmp_path):
    write_random_checkpoint(tmp_path, MODEL, parameters_of(MODEL))
    return tmp_path


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_everything_that_does_not_fit_is_listed_at_once(checkpoint):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()
        tensors["model.stranger"] = torch.zeros(3)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)

    rewrite(checkpoint, change)
    with pytest.raises(BundleMismatch) as caught:
        load_weights(checkpoint, parameters_of(MODEL))
    for text in (
        "missing: model.norm.weight [64]",
        "misshapen: lm_head.weight is [5, 64], the plan has [256, 64]",
        "unexpected: model.stranger [3]",
        "dtype: model.embed_tokens.weight is I8",
    ):
        assert text in str(caught.value)


def test_a_long_list_of_misfits_fits_a_screen(checkpoint):
    rewrite(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    with pytest.raises(BundleMismatch, match=r"\.\.\. and \d+ more") as caught:
        load_weights(checkpoint, parameters_of(tiny_model(layers=9, weight_dtype="fp32")))
    assert len(str(caught.value).splitlines()) <= 24


def test_buffers_that_follow_from_the_configuration_are_ignored(checkpoint):
    plain = load_weights(checkpoint, parameters_of(MODEL))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.ones(8)}))
    again = load_weights(checkpoint, parameters_of(MODEL))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[each], plain[each]) for each in plain)


def test_a_stage_does_not_take_the_tensors_of_others_for_strangers(checkpoint):
    parameters = parameters_of(MODEL)
    others = {source.name for each in parameters[3:] for source in each.sources}
    load_weights(checkpoint, parameters[:3], whole=others)
    with pytest.raises(BundleMismatch, match="unexpected: lm_head"):
        load_weights(checkpoint, parameters[:3])


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_takes_a_stored_head_only_if_it_is_the_embedding(checkpoint, same):
    def change(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[0, 0] += 0 if same else 1
        tensors["lm_head.weight"] = head

    rewrite(checkpoint, change)
    parameters = parameters_of(tiny_model(layers=2, weight_dtype="fp32", tie_embeddings=True))
    if same:
        found = load_weights(checkpoint, parameters)
        assert torch.equal(found["head"], found["embedding"])
    else:
        with pytest.raises(BundleMismatch, match=r"unexpected: lm_head\.weight"):
            load_weights(checkpoint, parameters)


def test_a_tied_checkpoint_for_an_untied_plan_says_so(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(BundleMismatch, match="ties its head"):
        load_weights(checkpoint, parameters_of(MODEL))


def test_weights_of_another_float_are_rounded_and_the_log_says_so(checkpoint, caplog):
    parameters = parameters_of(tiny_model(layers=2, weight_dtype="bf16"))
    found = load_weights(checkpoint, parameters)
    expected = random_weights(parameters_of(MODEL))
    assert_same(found, {name: each.bfloat16() for name, each in expected.items()})
    assert "fp32 tensors rounded to bf16" in caplog.text


def test_values_beyond_fp16_are_refused(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors["lm_head.weight"].fill_(1e6))
    with pytest.raises(BundleMismatch, match="exceed fp16"):
        load_weights(checkpoint, parameters_of(tiny_model(layers=2, weight_dtype="fp16")))


def test_folders_that_hold_no_weights_say_what_is_missing(tmp_path):
    with pytest.raises(BundleMismatch, match=r"no model\.safetensors"):
        load_weights(tmp_path, [])
    with pytest.raises(BundleMismatch, match="is no folder"):
        load_weights(tmp_path / "nowhere", [])
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BundleMismatch, match="safe_serialization"):
        load_weights(tmp_path, [])
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(BundleMismatch, match="cannot be read"):
        load_weights(tmp_path, [])


def test_an_incomplete_set_of_shards_is_refused(tmp_path):
    write_random_checkpoint(tmp_path, MODEL, parameters_of(MODEL), shard_bytes=50_000)
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(BundleMismatch, match=shard.name):
        load_weights(tmp_path, parameters_of(MODEL))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(BundleMismatch, match="incomplete"):
        load_weights(tmp_path, [])
    index.write_text("[]")
    with pytest.raises(BundleMismatch, match="no safetensors index"):
        load_weights(tmp_path, [])
