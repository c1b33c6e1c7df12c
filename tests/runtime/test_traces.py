"""Traces as users have them: every naming of columns, every broken rule with its place."""

import gzip
import json
import math
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.errors import InvalidFile, UsageError
from plans.workload import RequestClass, Workload
from runtime.arrivals import Load, child_rng, cut_lengths, offer
from runtime.servegen import gaps_s, weibull_shape
from runtime.traces import Trace, read_trace

CONTEXT = 1 << 20
REAL = Path(__file__).resolve().parents[3] / "shared" / "traces"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GENERIC = "arrival_s,input_tokens,output_tokens\n"


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def rows_of(path: Path) -> list[tuple[float | None, int, int]]:
    trace = read_trace(path)
    assert isinstance(trace, Trace)
    return [(row.arrival_s, row.input_tokens, row.output_tokens) for row in trace.rows]


NAMINGS = {
    "ours": (f"{GENERIC}1.5,10,2\n0.5,20,3\n", [(1.0, 10, 2), (0.0, 20, 3)]),
    "lengths": ("output_tokens,input_tokens\n2,10\n", [(None, 10, 2)]),
    "azure": (
        f"{AZURE}2023-11-16 23:59:59.7500000,10,2\n2023-11-17 00:00:01.0000000,20,3\n",
        [(0.0, 10, 2), (1.25, 20, 3)],
    ),
    "mooncake": (
        "timestamp,input_length,output_length\n3000,10,2\n4500,20,3\n",
        [(0.0, 10, 2), (1.5, 20, 3)],
    ),
    "vidur": ("num_prefill_tokens,num_decode_tokens,pd_ratio\n10,2,5.0\n", [(None, 10, 2)]),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens\n5,a,10,2\n45,b,20,3\n",
        [(0.0, 10, 2), (40.0, 20, 3)],
    ),
    "characters": ("input_chars,output_chars\n41,0\n", [(None, 11, 1)]),
    "byte order mark": ("\ufeffinput_tokens,output_tokens\n10,2\n\n", [(None, 10, 2)]),
}


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_reads_as_the_same_rows(tmp_path, naming, suffix):
    text, rows = NAMINGS[naming]
    assert rows_of(written(tmp_path, f"trace{suffix}", text)) == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_read_like_csv(tmp_path, suffix):
    records = [
        {"timestamp": 500, "input_length": 10, "output_length": 2, "hash_ids": [0, 1]},
        {"timestamp": 1000, "input_length": 20, "output_length": 3, "hash_ids": []},
    ]
    text = "\n\n".join(json.dumps(record) for record in records)
    assert rows_of(written(tmp_path, f"trace{suffix}", text)) == [(0.0, 10, 2), (0.5, 20, 3)]


def test_targets_and_classes_come_with_the_row(tmp_path):
    text = (
        "arrival_s,input_tokens,output_tokens,ttft_target_s,tbt_target_s,class_name\n"
        "0,10,2,0.25,,chat\n1,20,3,,0.1,\n"
    )
    offered = offer(written(tmp_path, "trace.csv", text), Load(), context_tokens=CONTEXT)
    first, second = offered.requests
    assert (first.ttft_target_s, first.tbt_target_s, first.class_name) == (0.25, None, "chat")
    assert (second.ttft_target_s, second.tbt_target_s, second.class_name) == (None, 0.1, None)


BROKEN = {
    "negative time": (".csv", f"{GENERIC}0,10,2\n-1,10,2\n", "line 3: arrival_s: -1 is negative"),
    "NaN time": (".csv", f"{GENERIC}nan,10,2\n", "line 2: arrival_s: 'nan' is no finite"),
    "infinite time": (".csv", f"{GENERIC}inf,10,2\n", "line 2: arrival_s: 'inf' is no finite"),
    "no prompt": (".csv", f"{GENERIC}0,0,2\n", "line 2: input_tokens: 0 is below 1 token"),
    "no answer": (".csv", f"{GENERIC}0,10,0\n", "line 2: output_tokens: 0 is below 1 token"),
    "half a token": (".csv", f"{GENERIC}0,10.5,2\n", "line 2: input_tokens: '10.5' is no whole"),
    "word": (".csv", f"{GENERIC}0,ten,2\n", "line 2: input_tokens: 'ten' is no finite number"),
    "huge": (".csv", f"{GENERIC}0,1e999,2\n", "line 2: input_tokens: '1e999' is no finite number"),
    "short row": (".csv", f"{GENERIC}0,10\n", "line 2: 2 values under 3 columns"),
    "long row": (".csv", f"{GENERIC}0,10,2,7\n", "line 2: 4 values under 3 columns"),
    "time missing in one row": (".csv", f"{GENERIC}0,10,2\n,10,2\n", "line 3: arrival_s: has no"),
    "no date": (
        ".csv",
        f"{AZURE}12:99,1,1\n",
        "line 2: TIMESTAMP: '12:99' is no ISO date",
    ),
    "target of zero": (
        ".csv",
        "input_tokens,output_tokens,ttft_target_s\n1,1,0\n",
        "line 2: ttft_target_s: a target is above 0",
    ),
    "columns missing": (".csv", "arrival_s,input_tokens\n0,1\n", "missing columns"),
    "header alone": (".csv", GENERIC, "the trace is empty"),
    "nothing": (".jsonl", "", "the trace is empty"),
    "no JSON": (".jsonl", '{"input_tokens": 1', "line 1: not one JSON object a line"),
    "JSON array": (".jsonl", "[1, 2]", "line 1: not one JSON object a line"),
    "null": (
        ".jsonl",
        '{"input_tokens": null, "output_tokens": 1}',
        "line 1: input_tokens: has no value",
    ),
    "boolean": (
        ".jsonl",
        '{"input_tokens": true, "output_tokens": 1}',
        "line 1: input_tokens: True is no finite number",
    ),
    "key missing in one line": (
        ".jsonl",
        '{"input_tokens": 1, "output_tokens": 1}\n{"input_tokens": 1}',
        "line 2: output_tokens: has no value",
    ),
    "a column twice": (
        ".csv",
        "arrival_s,input_tokens,output_tokens,input_tokens\n0,1,1,2\n",
        "line 1: column 'input_tokens' stands twice",
    ),
    "a quote that never ends": (
        ".csv",
        f'{GENERIC}0,1,1\n"1,1,1\n2,1,1\n',
        "line 4: unexpected end of data",
    ),
    "unknown ending": (".parquet", "x", "a trace ends in .csv, .jsonl"),
    "quantiles that fall": (
        ".csv",
        "quantile,input_tokens,output_tokens\n0,1,1\n0.5,9,1\n1,8,1\n",
        "line 4: input_tokens: 8 is below the row before it",
    ),
    "quantiles that stop early": (
        ".csv",
        "quantile,input_tokens,output_tokens\n0,1,1\n0.9,9,1\n",
        "line 3: quantile: the last row is 0.9, not 1",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_its_place(tmp_path, case):
    suffix, text, message = BROKEN[case]
    path = written(tmp_path, f"trace{suffix}", text)
    with pytest.raises(InvalidFile) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("column", ["arrival_s", "ttft_target_s", "input_tokens"])
@pytest.mark.parametrize("value", ["[]", "{}", "[" * 100_000])
def test_json_that_is_no_number_is_an_error_of_its_line(tmp_path, column, value):
    others = {"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}
    others.pop(column, None)
    text = f'{{"{column}": {value}, {json.dumps(others)[1:]}'
    with pytest.raises(InvalidFile, match="line 1: "):
        read_trace(written(tmp_path, "trace.jsonl", text))


def test_a_missing_file_and_broken_compression_are_errors_of_the_file(tmp_path):
    with pytest.raises(InvalidFile, match="no such file"):
        read_trace(tmp_path / "none.csv")
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(gzip.compress((GENERIC + "0,10,2\n" * 1000).encode())[:-20])
    with pytest.raises(InvalidFile, match="cannot be read"):
        read_trace(broken)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_text_that_is_not_utf_8_names_its_line(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    text = GENERIC.encode() + b"0,10,2\n" * 5000 + b"1,\xff,2\n" + b"0,10,2\n" * 5000
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    with pytest.raises(InvalidFile, match="line 5002: is not UTF-8 text"):
        read_trace(path)


def test_a_row_above_the_context_limit_names_its_line_and_the_nearest_plan(tmp_path):
    path = written(tmp_path, "trace.csv", f"{GENERIC}0,90,10\n1,95,6\n")
    with pytest.raises(InvalidFile, match=r"line 3: 95 prompt and 6 answer .*--max-context 101"):
        offer(path, Load(), context_tokens=100)
    assert len(offer(path, Load(), context_tokens=101).requests) == 2


def test_requests_are_numbered_by_arrival(tmp_path):
    path = written(tmp_path, "trace.csv", f"{GENERIC}7,70,1\n5,50,1\n7,71,1\n6,60,1\n")
    requests = offer(path, Load(), context_tokens=CONTEXT).requests
    assert [(each.number, each.arrival_s, each.prompt_tokens) for each in requests] == [
        (0, 0.0, 50),
        (1, 1.0, 60),
        (2, 2.0, 70),
        (3, 2.0, 71),
    ]


def test_a_rate_stretches_the_times_and_the_duration_cuts_afterwards(tmp_path):
    path = written(tmp_path, "trace.csv", GENERIC + "".join(f"{at},10,1\n" for at in range(11)))
    offered = offer(path, Load(qps=2.0, duration_s=3.0), context_tokens=CONTEXT)
    assert [each.arrival_s for each in offered.requests] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert "x 0.5" in offered.notes[0]


def test_lengths_alone_need_a_rate_and_then_arrive_shuffled(tmp_path):
    text = "input_tokens,output_tokens\n" + "".join(f"{each},1\n" for each in range(1, 101))
    path = written(tmp_path, "trace.csv", text)
    with pytest.raises(UsageError, match="--qps"):
        offer(path, Load(), context_tokens=CONTEXT)
    with pytest.raises(UsageError, match="no arrivals"):
        offer(path, Load(qps=1.0, arrivals="trace"), context_tokens=CONTEXT)
    requests = offer(path, Load(qps=1.0), context_tokens=CONTEXT).requests
    lengths = [each.prompt_tokens for each in requests]
    assert sorted(lengths) == list(range(1, 101)) != lengths
    other = offer(path, Load(qps=1.0, seed=1), context_tokens=CONTEXT).requests
    assert [each.prompt_tokens for each in other] != lengths


def test_rows_repeat_pass_by_pass_until_the_duration_ends(tmp_path):
    path = written(tmp_path, "trace.csv", "input_tokens,output_tokens\n1,1\n2,1\n3,1\n")
    offered = offer(path, Load(qps=10.0, duration_s=30.0), context_tokens=CONTEXT)
    lengths = [each.prompt_tokens for each in offered.requests]
    assert len(lengths) > 100
    for start in range(0, len(lengths) - 3, 3):
        assert sorted(lengths[start : start + 3]) == [1, 2, 3]
    assert "3 rows repeated" in offered.notes[0]


def test_a_burst_arrives_at_once(tmp_path):
    path = written(tmp_path, "trace.csv", f"{GENERIC}0,10,1\n5,20,1\n")
    burst = offer(path, Load(arrivals="burst"), context_tokens=CONTEXT).requests
    assert [each.arrival_s for each in burst] == [0.0, 0.0]
    sized = Load(arrivals="burst", qps=3.0, duration_s=2.0)
    assert len(offer(path, sized, context_tokens=CONTEXT).requests) == 6


@pytest.mark.parametrize(
    "load",
    [
        Load(qps=0.0),
        Load(qps=-1.0),
        Load(qps=math.nan),
        Load(qps=math.inf),
        Load(duration_s=0.0),
        Load(duration_s=math.nan),
        Load(seed=-1),
        Load(qps=1e6, duration_s=11.0),
    ],
)
def test_flags_outside_their_range_are_wrong_usage(tmp_path, load):
    path = written(tmp_path, "trace.csv", f"{GENERIC}0,10,1\n")
    with pytest.raises(UsageError, match="--"):
        offer(path, load, context_tokens=CONTEXT)


def mix() -> Workload:
    short = RequestClass(
        name="short",
        share=0.9,
        input_tokens=((0.0, 10), (1.0, 100)),
        output_tokens=((0.0, 1), (1.0, 50)),
    )
    long = RequestClass(
        name="long",
        share=0.1,
        input_tokens=((0.0, 1000), (1.0, 9000)),
        output_tokens=((0.0, 10), (1.0, 20)),
    )
    return Workload(name="mix", classes=(short, long), source="test")


@given(qps=st.floats(0.5, 20), duration=st.floats(5, 60), seed=st.integers(0, 2**40))
def test_a_workload_offers_what_its_tables_allow_and_again_the_same(qps, duration, seed):
    load = Load(qps=qps, duration_s=duration, seed=seed)
    try:
        requests = offer(mix(), load, context_tokens=4096).requests
    except UsageError:
        assert qps * duration < 30  # 30 expected and none drawn: a chance of 1e-13
        return
    assert requests == offer(mix(), load, context_tokens=4096).requests
    times = [each.arrival_s for each in requests]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < duration
    for number, each in enumerate(requests):
        assert each.number == number
        assert each.prompt_tokens + each.max_tokens <= 4096
        assert (each.prompt_tokens >= 1000) == (each.class_name == "long")


def test_poisson_arrivals_have_the_rate_and_the_spread_of_their_law():
    load = Load(qps=50.0, duration_s=400.0, seed=3)
    requests = offer(mix(), load, context_tokens=CONTEXT).requests
    # 20,000 expected, standard deviation 141; six of them is a chance of 2e-9.
    assert abs(len(requests) - 20_000) < 850
    gaps = np.diff([each.arrival_s for each in requests])
    # The CV of n exponential gaps strays by about 1 / sqrt(n) = 0.007.
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    share = sum(each.class_name == "long" for each in requests) / len(requests)
    assert share == pytest.approx(0.1, abs=6 * math.sqrt(0.09 / 20_000))


@given(prompt=st.integers(1, 10_000), answer=st.integers(1, 10_000), context=st.integers(2, 10_000))
def test_cut_lengths_fit_and_keep_what_fits(prompt, answer, context):
    cut = cut_lengths(prompt, answer, context)
    assert min(cut) >= 1
    assert sum(cut) <= context
    if prompt + answer <= context:
        assert cut == (prompt, answer)


def test_each_purpose_has_a_generator_of_its_own():
    draws = {
        child_rng(seed, *names).random()
        for seed in (0, 1)
        for names in (("arrivals",), ("order", "0"), ("order", "1"))
    }
    assert len(draws) == 6
    assert child_rng(0, "arrivals").random() in draws


@pytest.mark.parametrize("cv", [0.5, 1.0, 1.125, 3.17])
def test_the_weibull_shape_has_the_burstiness_asked_for(cv):
    shape = weibull_shape(cv)
    mean = math.gamma(1 + 1 / shape)
    variance = math.gamma(1 + 2 / shape) - mean**2
    assert math.sqrt(variance) / mean == pytest.approx(cv, rel=1e-6)


@pytest.mark.parametrize("family", ["Gamma", "Weibull"])
def test_gaps_have_the_rate_and_burstiness_of_their_window(family):
    gaps = gaps_s(child_rng(0, family), family, rate=4.0, cv=1.5, count=200_000)
    # Standard error of the mean: 0.375 / sqrt(200,000) = 0.0008; of the CV, below 0.02.
    assert gaps.mean() == pytest.approx(0.25, abs=0.005)
    assert gaps.std() / gaps.mean() == pytest.approx(1.5, abs=0.1)


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, BytesIO(text.encode()))
    return path


SERVEGEN = {
    "a/chunk-0-trace.csv": "0,5.0,1.0,Gamma,1,0.2\n600,0,0,,0,0\n",
    "a/chunk-0-dataset.json": json.dumps(
        {"0": {"input_tokens": "{7: 0.5, 9: 0.5}", "output_tokens": "{3: 1.0}"}}
    ),
    "a/chunk-1-trace.csv": "0,0,0,,0,0\n",
    "a/chunk-1-dataset.json": json.dumps({"0": {"input_tokens": "{}", "output_tokens": "{}"}}),
}


def test_a_servegen_archive_gives_single_requests_at_the_rate(tmp_path):
    path = archive(tmp_path / "clients.tar.gz", SERVEGEN)
    requests = offer(path, Load(qps=10.0, duration_s=200.0), context_tokens=CONTEXT).requests
    assert abs(len(requests) - 2000) < 270  # six standard deviations
    assert {each.prompt_tokens for each in requests} == {7, 9}
    assert {each.max_tokens for each in requests} == {3}
    times = [each.arrival_s for each in requests]
    assert times == sorted(times)
    assert times[-1] < 200


def test_broken_archives_name_what_is_wrong(tmp_path):
    bad_window = {**SERVEGEN, "a/chunk-0-trace.csv": "0,five,1,Gamma,1,1\n"}
    bad_chance = {
        **SERVEGEN,
        "a/chunk-0-dataset.json": '{"0": {"input_tokens": "{7: -1}", "output_tokens": "{3: 1}"}}',
    }
    for files, message in [
        (bad_window, "chunk-0-trace.csv: line 1"),
        (bad_chance, "chunk-0-dataset.json"),
        ({"readme.txt": "x"}, "no client in it"),
    ]:
        path = archive(tmp_path / "bad.tar.gz", files)
        with pytest.raises(InvalidFile, match=message):
            offer(path, Load(), context_tokens=CONTEXT)


# --- the public traces ------------------------------------------------------------------------

needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"the public traces are not at {REAL}: see bench/demo.py for others"
)


@needs_real
@pytest.mark.parametrize(
    ("name", "rows", "span_s", "longest"),
    [  # from the table of the folder's README, which counted them independently
        ("azure2023_code.csv", 8_819, 3_436, 7_437),
        ("azure2023_conv.csv", 19_366, 3_502, 14_050),
        ("mooncake_fast25_conversation_trace.jsonl.gz", 12_031, 3_537, 126_195),
        ("mooncake_fast25_synthetic_trace.jsonl", 3_993, 1_022, 191_378),
    ],
)
def test_public_traces_with_times(name, rows, span_s, longest):
    requests = offer(REAL / name, Load(), context_tokens=CONTEXT).requests
    assert len(requests) == rows
    assert requests[-1].arrival_s == pytest.approx(span_s, abs=1)
    assert max(each.prompt_tokens for each in requests) == longest


@needs_real
@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("medha_mix_0pct_long.csv", 8_032),
        ("medha_mix_5pct_long.csv", 996_935),
        ("lmcache_agent_sessions_chars.csv", 145_122 // 4 + 1),
        ("vidur_arxiv_summarization_llama2_lengths.csv", 4_054),
    ],
)
def test_public_traces_of_lengths(name, longest):
    requests = offer(REAL / name, Load(qps=2.0), context_tokens=CONTEXT).requests
    assert max(each.prompt_tokens for each in requests) == longest


@needs_real
@pytest.mark.parametrize(
    "name", ["servegen_m-mid_length_quantiles.csv", "servegen_reason_deepseek-r1.tar.gz"]
)
def test_public_distributions_are_sampled(name):
    offered = offer(REAL / name, Load(qps=2.0, duration_s=300.0), context_tokens=CONTEXT)
    assert len(offered.requests) > 300
    assert offered.notes
