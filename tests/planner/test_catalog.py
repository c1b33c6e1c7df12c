"""The catalog: entries load, are canonical and say what is publicly known; names and layouts."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import catalog
from planner.catalog import (
    CATALOG,
    load_device,
    load_model,
    load_node_type,
    load_workload,
    names,
    topology_for,
)
from plans.codec import dump_file, dumps, load_file
from plans.errors import InvalidFile, UnknownName, UsageError
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
}


def small_node(*, per_node: int, nodes: int | None = None) -> NodeType:
    """Node type of H200 devices."""
    links = load_node_type("dgx-h200").links
    return NodeType(
        name="small", device="h200-sxm-141gb", devices_per_node=per_node, nodes=nodes, links=links
    )


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


def test_transformers_counts_the_same_parameters():
    """Each model is built by transformers without memory (device meta) from the same figures."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in MODELS:
        model = load_model(name)
        with torch.device("meta"):
            reference = transformers.AutoModelForCausalLM.from_config(hub_config(model))
        counted = sum(each.numel() for each in reference.parameters())  # a tied head counts once
        # all layers are alike, so two of them give the count of all
        layers = reference.model.layers
        counted += (model.layers - len(layers)) * sum(
            each.numel() for each in layers[0].parameters()
        )
        assert counted == model.parameters, name


def hub_config(model: Model):
    """transformers' configuration of the model, with two layers."""
    import transformers  # noqa: PLC0415 - seconds that the other tests need not wait

    kind = transformers.LlamaConfig
    if model.qkv_bias:
        kind = transformers.Qwen2Config
    if model.qk_norm:
        kind = transformers.Qwen3Config
    return kind(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=2,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tie_embeddings,
    )


def test_kv_bytes_of_a_token_are_the_known_ones():
    assert load_model("llama3-70b").kv_bytes_per_token("bf16") == 327_680
    assert load_model("llama3-8b").kv_bytes_per_token("bf16") == 131_072


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
    assert sorted(link.scope for link in node.links) == ["cluster", "node"]
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


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "layout"),
    [(1, (1, 1)), (7, (1, 7)), (8, (1, 8)), (10, (2, 5)), (12, (2, 6)), (16, (2, 8)), (21, (3, 7))],
)
def test_gpus_fill_the_fewest_nodes_evenly(gpus, layout):
    topology = topology_for(load_device("h100"), gpus)
    assert (topology.nodes, topology.devices_per_node) == layout


@pytest.mark.parametrize(
    ("gpus", "nearest"), [(17, "16 or 18"), (9, "8 or 10"), (0, "1"), (-3, "1")]
)
def test_counts_that_do_not_divide_name_the_nearest_that_do(gpus, nearest):
    with pytest.raises(UsageError, match=f"nearest: {nearest}$"):
        topology_for(load_device("h100"), gpus)


def test_a_topology_carries_the_memory_and_only_the_links_in_use():
    device = load_device("h200")
    one, node, cluster = (topology_for(device, gpus) for gpus in (1, 8, 16))
    assert one.links == ()
    assert [link.kind for link in node.links] == ["nvlink"]
    assert [link.kind for link in cluster.links] == ["nvlink", "infiniband"]
    assert {each.device_memory_bytes for each in (one, node, cluster)} == {device.memory_bytes}


def test_one_device_a_node_uses_the_cluster_link_alone():
    topology = topology_for(load_device("cpu"), 2)
    assert (topology.nodes, topology.devices_per_node) == (2, 1)
    assert [link.scope for link in topology.links] == ["cluster"]


def test_a_topology_file_is_used_and_bounds_the_gpus(tmp_path):
    path = tmp_path / "lab.yaml"
    dump_file(path, small_node(per_node=8, nodes=3))
    device = load_device("h200")
    assert topology_for(device, 24, path).nodes == 3
    assert topology_for(device, 9, str(path)).devices_per_node == 3  # its third node makes it even
    with pytest.raises(UsageError, match=r"nearest: 24$"):
        topology_for(device, 32, path)


def test_a_machine_of_another_device_is_refused():
    with pytest.raises(UsageError, match="has h100-sxm-80gb, not a100-sxm-80gb"):
        topology_for(load_device("a100"), 8, "dgx-h100")


def test_a_missing_link_is_named(tmp_path):
    alone = msgspec.structs.replace(small_node(per_node=4), links=())
    assert topology_for(load_device("h200"), 1, alone).links == ()
    with pytest.raises(UsageError, match="no link of scope 'node'"):
        topology_for(load_device("h200"), 4, alone)


def test_two_links_of_one_scope_are_refused(tmp_path):
    node = small_node(per_node=8)
    path = tmp_path / "double.yaml"
    dump_file(path, msgspec.structs.replace(node, links=(*node.links, node.links[0])))
    with pytest.raises(InvalidFile, match="at most one link has scope node"):
        load_node_type(path)


def test_a_missing_topology_file_is_named(tmp_path):
    with pytest.raises(InvalidFile, match="no such file"):
        load_node_type(str(tmp_path / "none.yaml"))


@given(
    gpus=st.integers(-2, 80),
    per_node=st.integers(1, 9),
    nodes=st.none() | st.integers(1, 8),
)
def test_a_layout_has_exactly_the_gpus_or_names_counts_that_fit(gpus, per_node, nodes):
    node = small_node(per_node=per_node, nodes=nodes)
    device = load_device("h200")
    # brute force over all layouts that the rule allows
    fewest = max(1, -(-gpus // per_node))
    most = fewest if nodes is None else nodes
    even = [n for n in range(1, most + 1) if gpus >= 1 and gpus % n == 0 and gpus // n <= per_node]
    try:
        topology = topology_for(device, gpus, node)
    except UsageError as error:
        assert even == []
        for count in str(error).rpartition("nearest: ")[2].split(" or "):
            assert topology_for(device, int(count), node).devices == int(count)
    else:
        assert topology.devices == gpus
        assert topology.nodes == min(even)


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
