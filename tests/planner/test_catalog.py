"""The catalog: entries load, are canonical and say what is publicly known; names and layouts."""

import subprocess
import sys
from pathlib import Path

import pytest

from planner import catalog
from planner.catalog import (
    CATALOG,
    hub_id,
    load_device,
    load_model,
    load_node_type,
    load_workload,
    names,
)
from plans.codec import dumps, load_file
from plans.errors import InvalidFile, UnknownName
from plans.model import Model
from plans.topology import Device, NodeType
from plans.workload import Workload, length_at

TYPES = {"devices": Device, "models": Model, "topologies": NodeType, "workloads": Workload}
ENTRIES = [(kind, name) for kind in TYPES for name in names(kind)]
MODELS = names("models")
DEVICES = names("devices")

# Totals of the safetensors files on the Hugging Face Hub. Qwen3-0.6B and 1.7B store their tied head
# a second time there and are left out.
PUBLIC_PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "llama3-8b-1048k": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
}
# Billions of parameters, all and those of one token, as their authors count them: mistral.ai's
# announcements of Mixtral 8x7B and 8x22B; the model cards Qwen/Qwen3-30B-A3B and -235B-A22B; the
# README_WEIGHTS.md of deepseek-ai/DeepSeek-V3, whose 36.6 leave the embedding out.
PUBLIC_ACTIVE = {
    "mixtral-8x7b": (46.7, 12.9, 0.0),
    "mixtral-8x22b": (141, 39, 0.0),
    "qwen3-30b-a3b": (30.5, 3.3, 0.0),
    "qwen3-235b-a22b": (235, 22, 0.0),
    "deepseek-v3": (671, 36.6, 0.93),
}


# --- entries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_is_canonical_and_named_after_its_file(kind, name):
    path = CATALOG / kind / f"{name}.yaml"
    value = load_file(path, TYPES[kind])
    lines = path.read_text().splitlines(keepends=True)
    assert value.name == name
    assert "".join(line for line in lines if not line.startswith("#")) == dumps(value)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_names_its_source(name):
    text = (CATALOG / "models" / f"{name}.yaml").read_text()
    assert text.startswith("# Source: ")


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_the_rules_of_grouped_attention(name):
    model = load_model(name)
    assert model.heads % model.kv_heads == 0
    assert model.head_dim % 2 == 0


@pytest.mark.parametrize("name", PUBLIC_PARAMETERS)
def test_parameters_are_the_public_ones(name):
    assert load_model(name).parameters == PUBLIC_PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLIC_ACTIVE)
def test_parameters_of_experts_are_the_public_ones(name):
    every, active, embedding = PUBLIC_ACTIVE[name]
    model = load_model(name)
    assert model.parameters / 1e9 == pytest.approx(every, rel=0.005)
    # three digits are published at most, and one of the two of a name such as A3B
    assert model.active_parameters / 1e9 - embedding == pytest.approx(active, rel=0.02)


def test_transformers_counts_the_same_parameters():
    """Each model is built by transformers without memory (device meta) from the same figures."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in MODELS:
        model = load_model(name)
        with torch.device("meta"):
            reference = transformers.AutoModelForCausalLM.from_config(hub_config(model))
        counted = sum(each.numel() for each in reference.parameters())  # a tied head counts once
        # two layers give the count of all: the last kind stands for all that are left out
        layers = reference.model.layers
        per_layer = [sum(each.numel() for each in layer.parameters()) for layer in layers]
        more_dense = max(model.dense_layers - 1, 0) if model.experts else 0
        counted += more_dense * per_layer[0]
        counted += (model.layers - len(layers) - more_dense) * per_layer[1]
        assert counted == model.parameters, name


def hub_config(model: Model):
    """transformers' configuration of the model, with two layers."""
    import transformers  # noqa: PLC0415 - seconds that the other tests need not wait

    kind = transformers.LlamaConfig
    if model.qkv_bias:
        kind = transformers.Qwen2Config
    if model.qk_norm:
        kind = transformers.Qwen3Config
    shape = {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model.experts is not None:
        kind = {
            "deepseek_v3": transformers.DeepseekV3Config,
            "mixtral": transformers.MixtralConfig,
            "qwen3_moe": transformers.Qwen3MoeConfig,
        }[model.family]
        shape |= {
            "num_local_experts": model.experts.count,
            "num_experts": model.experts.count,
            "n_routed_experts": model.experts.count,
            "num_experts_per_tok": model.experts.per_token,
            "moe_intermediate_size": model.experts.ffn,
            "n_shared_experts": model.experts.shared_ffn // model.experts.ffn,
            "first_k_dense_replace": min(model.experts.dense_layers, 1),
        }
    if model.latent is not None:
        del shape["head_dim"]
        shape |= {
            "q_lora_rank": model.latent.q_rank,
            "kv_lora_rank": model.latent.kv_rank,
            "qk_rope_head_dim": model.latent.rope_dim,
            "qk_nope_head_dim": model.latent.nope_dim,
            "v_head_dim": model.latent.value_dim,
        }
    return kind(**shape)


def test_kv_bytes_of_a_token_are_the_known_ones():
    assert load_model("llama3-70b").kv_bytes_per_token("bf16") == 327_680
    assert load_model("llama3-8b").kv_bytes_per_token("bf16") == 131_072
    # 512 + 64 numbers a layer (arXiv 2405.04434, section 2.1), 61 layers
    assert load_model("deepseek-v3").kv_bytes_per_token("bf16") == 576 * 61 * 2
    assert load_model("qwen3-235b-a22b").kv_bytes_per_token("bf16") == 2 * 94 * 4 * 128 * 2


def test_latent_kv_is_not_split_by_tensor_parallelism():
    model = load_model("deepseek-v3")
    assert model.rank_kv_elements(8) == model.rank_kv_elements(1) == 576
    assert load_model("llama3-70b").rank_kv_elements(8) == 2 * 128


def test_flops_of_experts_follow_those_that_a_token_visits():
    model = load_model("mixtral-8x7b")
    attention = 4096 * (32 + 2 * 8) * 128 + 4096 * 4096
    visited = 2 * 3 * 4096 * 14336 + 8 * 4096
    assert model.matmul_flops(10) == 2 * 10 * 32 * (attention + visited)
    assert model.experts.visited(1) == pytest.approx(2)
    assert model.experts.visited(1000) == pytest.approx(8)


@pytest.mark.parametrize("name", DEVICES)
def test_devices_say_where_each_figure_comes_from(name):
    device = load_device(name)
    figures = {
        field
        for field in Device.__struct_fields__
        if field.endswith(("_bytes", "_per_s", "_efficiency", "_s"))
    }
    assert figures <= device.sources.keys()
    assert load_node_type(device.default_node).device == name
    assert device.reserved_bytes < device.memory_bytes
    assert all(peak > 0 for peak in device.peak_flops_per_s.values())


@pytest.mark.parametrize("name", names("topologies"))
def test_node_types_have_both_links_and_a_device_of_the_catalog(name):
    node = load_node_type(name)
    scopes = sorted(link.scope for link in node.links)
    assert scopes == ([] if node.fabric else ["cluster", "node"])
    assert node.device in DEVICES


@pytest.mark.parametrize("name", names("workloads"))
def test_workloads_are_distributions(name):
    workload = load_workload(name)
    assert sum(each.share for each in workload.classes) == pytest.approx(1.0, abs=1e-12)
    for each in workload.classes:
        for table in (each.input_tokens, each.output_tokens):
            quantiles = [row[0] for row in table]
            assert quantiles[0] == 0
            assert quantiles[-1] == 1
            assert quantiles == sorted(set(quantiles))
            assert [row[1] for row in table] == sorted(row[1] for row in table)


def test_the_default_mix_has_the_published_percentiles():
    """Nearest-rank percentiles of the trace of arXiv 2409.17264, 5 % long requests."""
    short, long = load_workload("paper-mix-5").classes
    assert [length_at(short.input_tokens, q) for q in (0.5, 0.9, 0.99)] == [1712, 5683, 7435]
    assert [length_at(short.output_tokens, q) for q in (0.5, 0.9, 0.99)] == [415, 836, 997]
    assert (long.input_tokens[0][1], long.input_tokens[-1][1]) == (100_628, 996_935)
    assert [length_at(long.output_tokens, q) for q in (0.5, 0.9)] == [522, 792]
    assert long.share == pytest.approx(1000 / 20500, abs=5e-5)  # rounded to four places


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("llama3-70b", "llama3-70b"),
        ("llama-3-70b", "llama3-70b"),
        ("Llama3-70B", "llama3-70b"),
        ("LLAMA_3_70B", "llama3-70b"),
        ("meta-llama/Meta-Llama-3-70B", "llama3-70b"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "llama3-70b"),
        ("Meta-Llama-3.1-8B-Instruct", "llama3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3-70b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("tiny_llama", "tiny-llama"),
    ],
)
def test_models_answer_to_the_names_that_people_type(typed, name):
    assert load_model(typed).name == name


@pytest.mark.parametrize(
    "typed",
    [
        "meta-llama/Llama-3.1-8",
        "mistralai/Mistral-7B-v0.1",  # has a sliding window
        "Qwen/Qwen2.5-7B",  # the base model has another context limit
        "other/llama3-8b",
    ],
)
def test_models_that_only_look_alike_are_unknown(typed):
    with pytest.raises(UnknownName, match="unknown model"):
        load_model(typed)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UnknownName) as caught:
        load_model("llama3-7b")
    assert "llama3-70b" in caught.value.nearest
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("a100", "a100-sxm-80gb"),
        ("H100", "h100-sxm-80gb"),
        ("h100_sxm", "h100-sxm-80gb"),
        ("h200", "h200-sxm-141gb"),
        ("H200-SXM-141GB", "h200-sxm-141gb"),
        ("b200", "b200-sxm-180gb"),
        ("cpu", "cpu"),
    ],
)
def test_devices_answer_to_the_names_that_people_type(typed, name):
    assert load_device(typed).name == name


@pytest.mark.parametrize(
    ("load", "typed", "nearest"),
    [
        (load_device, "h300", "h300"),
        (load_node_type, "dgx-h20", "dgx-h200"),
        (load_workload, "paper-mix-2", "paper-mix-1"),
    ],
)
def test_other_unknown_names_list_what_is_known(load, typed, nearest):
    with pytest.raises(UnknownName, match=nearest):
        load(typed)


def test_no_spelling_means_two_entries():
    """An alias that repeats another entry's name or alias would silently lose."""
    table = load_file(catalog.MODEL_ALIASES, dict[str, tuple[str, ...]])
    assert table.keys() <= set(MODELS)
    spelled = {name: {*ids, *(each.split("/")[-1] for each in ids)} for name, ids in table.items()}
    for groups in (
        {name: spelled.get(name, set()) | {name} for name in MODELS},
        {name: {*load_device(name).aliases, name} for name in DEVICES},
    ):
        keys = [
            key for group in groups.values() for key in {catalog.name_key(each) for each in group}
        ]
        assert len(keys) == len(set(keys))


def test_a_folder_is_read_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(InvalidFile, match="has no config"):
        load_model(tmp_path)
    with pytest.raises(InvalidFile, match="no such folder"):
        load_model(str(tmp_path / "missing"))


def test_models_have_their_first_hub_id():
    assert hub_id("llama3-70b") == "meta-llama/Meta-Llama-3-70B"
    assert hub_id("tiny-llama") is None


# --- weight -------------------------------------------------------------------------------------


def test_the_catalog_module_wins_over_its_data_folder_and_loads_nothing_heavy():
    code = """
import sys
from planner import catalog
catalog.load_model("llama3-70b")
assert catalog.__file__.endswith("catalog.py"), catalog.__file__
print([name for name in ("networkx", "numpy", "torch") if name in sys.modules])
"""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
