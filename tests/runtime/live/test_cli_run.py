"""`medha-run`: request files in, result files out, and what is said when something is wrong."""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live_bundles import TOY_FILES, TOY_VOCAB, toy_answer, toy_plan, write_bundle
from safetensors.torch import save_file
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers

import runtime.cli_run
import runtime.executor.live
from runtime.executor.live import LiveExecutor
from runtime.offline import Result

WORDS = [f"w{token}" for token in range(TOY_VOCAB)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("toy"), toy_plan(), TOY_FILES)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one word a token; w0 ends an answer."""
    folder = tmp_path_factory.mktemp("words")
    encoder = Encoder(models.WordLevel({word: at for at, word in enumerate(WORDS)}, "w1"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.save(str(folder / "tokenizer.json"))
    template = "{% for each in messages %}{{ each.content }} {% endfor %}"
    config = {"eos_token": "w0", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: Any) -> Run:
    """Runs the command over lines (objects or texts); exit status, stdout, stderr."""

    def call(*lines: object, flags: tuple[object, ...] = ()) -> tuple[int, str, str]:
        requests = tmp_path / "requests.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        requests.write_text("\n".join(texts))
        argv = ["medha-run", bundle, "--weights", "random", "--requests", requests, *flags]
        monkeypatch.setattr(sys, "argv", [str(each) for each in argv])
        with pytest.raises(SystemExit) as ended:
            runtime.cli_run.main()
        out, err = capsysbinary.readouterr()
        return int(ended.value.code or 0), out.decode(), err.decode()

    return call


def results_of(text: str) -> list[Result]:
    return [msgspec.json.decode(line, type=Result) for line in text.splitlines()]


# --- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "graphs"), [((), True), (("--no-graphs",), False)])
def test_whoever_runs_may_decline_graphs(run, monkeypatch, flag, graphs):
    made = []

    class Noted(runtime.executor.live.LiveExecutor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(kwargs["graphs"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(runtime.executor.live, "LiveExecutor", Noted)
    status, out, _ = run({"token_ids": [5, 6, 7], "max_tokens": 4}, flags=flag)
    assert status == 0
    assert list(results_of(out)[0].token_ids) == toy_answer([5, 6, 7], 4)
    assert made == [graphs]


def test_answers_come_in_the_order_of_the_requests_with_their_ids(run):
    status, out, err = run(
        {"id": "a", "token_ids": [5, 6, 7], "max_tokens": 9},
        "",
        {"token_ids": list(range(60)), "max_tokens": 3, "arrival_s": 0.01},
    )
    first, second = results_of(out)
    assert status == 0
    assert (first.id, second.id) == ("a", 3)
    assert list(first.token_ids) == toy_answer([5, 6, 7], 9)
    assert list(second.token_ids) == toy_answer(range(60), 3)
    assert first.finish_reason == "length"
    assert first.text is None
    assert first.prompt_tokens == 3
    assert first.ttft_s > 0
    assert "short" in err


def test_quiet_says_nothing_but_the_results(run):
    status, out, err = run({"token_ids": [1]}, flags=("--quiet",))
    assert (status, err) == (0, "")
    assert len(results_of(out)) == 1


def test_results_go_to_a_file_as_a_whole(run, tmp_path):
    target = tmp_path / "out.jsonl"
    status, out, _ = run({"token_ids": [1]}, flags=("--out", target))
    assert (status, out) == (0, "")
    assert len(results_of(target.read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl", "requests.jsonl"]


def test_a_dash_is_stdout(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run({"token_ids": [1]}, flags=("--out", "-"))
    assert (status, len(results_of(out))) == (0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.jsonl"]


def test_no_input_is_replaced_by_the_results(run, bundle, words, tmp_path, monkeypatch):
    monkeypatch.setattr(LiveExecutor, "__init__", None)
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "requests.jsonl")
    request = {"token_ids": [1]}
    for out, flag in (
        (tmp_path / "requests.jsonl", "--requests"),
        (link, "--requests"),
        (bundle / "plan.yaml", "BUNDLE"),
        (bundle / "program" / "stage_0.py", "BUNDLE"),
        (words / "tokenizer.json", "--tokenizer"),
    ):
        before = out.read_bytes() if out.parent != tmp_path else json.dumps(request).encode()
        status, _, err = run(request, flags=("--out", out, "--tokenizer", words))
        assert (status, err) == (
            2,
            f"--out {out}: would replace an input ({flag}); name another file\n",
        )
        assert out.read_bytes() == before


def test_results_that_their_place_refuses_are_kept_elsewhere(run, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(kept))
    status, out, err = run({"token_ids": [5, 6], "max_tokens": 3}, flags=("--out", "/dev/full"))
    (file,) = kept.iterdir()
    assert (status, out) == (1, "")
    assert err == (
        f"/dev/full: cannot be written: No space left on device\nthe results are in {file}\n"
    )
    assert list(results_of(file.read_text())[0].token_ids) == toy_answer([5, 6], 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    _, _, err = run({"token_ids": [5]}, flags=("--out", "/dev/full"))
    assert err.endswith("and no temporary file takes the results: No such file or directory\n")


def test_texts_and_chats_are_tokenised_and_answered_in_text(run, words):
    status, out, _ = run(
        {"prompt": "w5 w6", "max_tokens": 4, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 4, "ignore_eos": True},
        flags=("--tokenizer", words),
    )
    expected = toy_answer([5, 6], 4)
    for result in results_of(out):
        assert list(result.token_ids) == expected
        assert result.text.split() == [WORDS[token] for token in expected if token]
    assert status == 0


def test_an_answer_ends_at_a_stop_token_a_stop_string_or_an_end_token(run, words):
    prompt = next(
        [first, second]
        for first in range(TOY_VOCAB)
        for second in range(TOY_VOCAB)
        if 0 in toy_answer([first, second], 10)[4:]
    )
    expected = toy_answer(prompt, 10)
    end = expected.index(0) + 1
    _, out, _ = run(
        {"token_ids": prompt, "max_tokens": 10},
        {"token_ids": prompt, "max_tokens": 10, "ignore_eos": True},
        {"token_ids": prompt, "max_tokens": 10, "stop_token_ids": [expected[1]]},
        {"token_ids": prompt, "max_tokens": 10, "stop": [f"{WORDS[expected[2]]}"]},
        flags=("--tokenizer", words),
    )
    own, ignored, token, text = results_of(out)
    assert (list(own.token_ids), own.finish_reason) == (expected[:end], "stop")
    assert (list(ignored.token_ids), ignored.finish_reason) == (expected, "length")
    assert list(token.token_ids) == expected[:2]
    assert text.finish_reason == "stop"
    assert WORDS[expected[2]] not in text.text.split()


def test_the_weights_folder_names_end_tokens_also_without_a_tokenizer(run, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({}, weights / "model.safetensors")
    expected = toy_answer([5, 6, 7], 9)
    (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": expected[3]}))
    _, out, _ = run(
        {"token_ids": [5, 6, 7], "max_tokens": 9},
        {"token_ids": [5, 6, 7], "max_tokens": 9, "ignore_eos": True},
        flags=("--weights", weights, "--tokenizer", "none"),
    )
    assert [list(result.token_ids) for result in results_of(out)] == [expected[:4], expected]


# --- misfits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: is no JSON"),
        ("[1]", ":2: "),
        ('{"token_ids": [1], "temperature": NaN}', "NaN is no JSON number"),
        ('{"token_ids": [1], "token_ids": [2]}', "'token_ids' stands twice"),
        ({"token_ids": [1], "max_token": 3}, ":2: max_token: unknown field; nearest: max_tokens"),
        ({"token_ids": [1], "max_tokens": "3"}, ":2: max_tokens: "),
        ({"token_ids": [1], "max_tokens": 0}, ":2: max_tokens: "),
        ({"token_ids": [1, -1]}, r":2: token_ids\[1\]: "),
        ({"token_ids": [97]}, "token 97 is not below the model's vocabulary of 97"),
        ({"token_ids": []}, ":2: token_ids: is empty"),
        ({"max_tokens": 3}, "exactly one of prompt, token_ids and messages .* found none"),
        ({"prompt": "a", "token_ids": [1]}, "found prompt and token_ids"),
        ({"prompt": "a"}, ":2: prompt: needs a tokenizer"),
        ({"prompt": ""}, ":2: prompt: is empty"),
        ({"messages": []}, ":2: messages: is empty"),
        ("[" * 100_000, ":2: is no JSON: maximum recursion depth"),
        (r'{"token_ids": [1], "id": "\ud800"}', ":2: is no JSON: .* surrogates not allowed"),
        ({"token_ids": [1], "arrival_s": 1e300}, ":2: arrival_s: "),
        ({"token_ids": [1], "stop": ["a"]}, ":2: stop: needs a tokenizer"),
        ({"token_ids": [1], "stop": [""]}, r":2: stop\[0\]: "),
        ({"token_ids": [1], "top_p": 0}, ":2: top_p: 0.0 is not above 0"),
        ({"token_ids": [1], "arrival_s": -1}, ":2: arrival_s: "),
        (
            {"token_ids": [1] * 250, "max_tokens": 7},
            "exceed the plan's context limit of 256 tokens; nearest: max_tokens 6",
        ),
        ({"id": "first", "token_ids": [1]}, ":2: id: 'first' is the id of line 1 too"),
    ],
)
def test_a_line_that_breaks_a_rule_is_named_before_anything_is_loaded(
    run, monkeypatch, line, message
):
    monkeypatch.setattr(LiveExecutor, "__init__", None)
    status, out, err = run({"id": "first", "token_ids": [1]}, line)
    assert (status, out) == (2, "")
    assert re.search(message, err), err


def test_an_empty_prompt_text_is_refused(run, words):
    status, _, err = run({"prompt": ""}, flags=("--tokenizer", words))
    assert status == 2
    assert "prompt: is empty" in err


def test_a_file_without_a_request_is_refused(run):
    assert run("", "  ")[0] == 2


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--policy", "larz"), 2, "nearest: lars"),
        (("--weights", "nowhere", "--tokenizer", "none"), 2, "nowhere: no such folder; --weights"),
        (("--weights", "nowhere"), 2, "nowhere: no such folder; --weights"),
        (("--weights", "."), 2, "no tokenizer.json"),
        (("--tokenizer", "nowhere"), 2, "nowhere: no such folder; --tokenizer"),
        (("--tokenizer", "."), 2, "no tokenizer.json"),
        (("--out", "nowhere/out.jsonl"), 2, "does not exist"),
        (("--out", "."), 2, "is a folder"),
        (("--requests", "nowhere.jsonl"), 2, "cannot be read"),
        (("--colour", "red"), 2, "No such option"),
    ],
)
def test_flags_that_name_nothing_end_with_their_status(run, flags, status, message):
    found, out, err = run({"token_ids": [1]}, flags=flags)
    assert (found, out) == (status, "")
    assert message in err


def test_an_interrupted_run_writes_nothing_and_ends_with_130(run, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveExecutor, "submit", interrupt)
    status, _, err = run({"token_ids": [1]}, flags=("--out", tmp_path / "out.jsonl"))
    assert status == 130
    assert "no results were written" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_whatever_breaks_a_run_every_request_has_its_line_and_nobody_sees_a_traceback(
    run, monkeypatch
):
    def breaks(self: LiveExecutor, step: object) -> None:
        raise KeyError("no such row")

    monkeypatch.setattr(LiveExecutor, "submit", breaks)
    status, out, err = run({"token_ids": [1]}, {"token_ids": [2], "arrival_s": 100.0})
    assert status == 1
    assert [result.finish_reason for result in results_of(out)] == ["failed", "failed"]
    assert err == "2 of 2 requests failed: the engine failed: KeyError: 'no such row'\n"
