"""Tokens and text: streaming, stop strings, chat templates and end tokens of a model folder."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from plans.errors import BundleMismatch, InvalidFile, UsageError
from runtime.tokenizer import TextStream, Tokenizer, check_vocab, end_tokens, load_tokenizer

CHAT = """{%- if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
{{ bos_token }}{% for message in messages %}
    <|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}{{ {'é': 1} | tojson }}"""


def byte_level_encoder() -> Encoder:
    """A small byte-level BPE tokenizer, trained on the spot; BOS in front of each text."""
    encoder = Encoder(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.train_from_iterator(
        ["the cat sat on the mat, the cats met", "grüße 你好 🎉 🎉"] * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    encoder.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return encoder


def space_stripping_decoder() -> Encoder:
    """Word pieces behind a marker, as SentencePiece writes them; byte tokens for the rest."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁"]
    encoder = Encoder(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    encoder.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return encoder


def write_folder(folder: Path, **files: object) -> Path:
    byte_level_encoder().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT}
    files = {"tokenizer_config": config, **files}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


# --- streaming ----------------------------------------------------------------------------------

BYTE_LEVEL = byte_level_encoder()
TOKENS = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30)
TEXTS = st.text(st.sampled_from("theca sm,é你🎉"), max_size=12)


def streamed(decoder: object, tokens: list[int], *, prompt: tuple[int, ...] = ()) -> str:
    stream = TextStream(decoder, prompt=prompt)
    return "".join([*map(stream.push, tokens), stream.finish()])


@given(TOKENS)
def test_streamed_pieces_join_to_the_whole_text(tokens):
    assert streamed(BYTE_LEVEL, tokens) == BYTE_LEVEL.decode(tokens)


@given(TEXTS)
def test_no_piece_of_valid_text_holds_half_a_character(text):
    stream = TextStream(BYTE_LEVEL)
    for token in BYTE_LEVEL.encode(text, add_special_tokens=False).ids:
        assert "\N{REPLACEMENT CHARACTER}" not in stream.push(token)


def test_bytes_that_are_no_text_are_given_out_in_the_end():
    stream = TextStream(BYTE_LEVEL)
    broken = BYTE_LEVEL.token_to_id("ÿ")  # byte 0xFF, never part of UTF-8
    assert any(stream.push(broken) for _ in range(64))


def test_the_first_word_keeps_its_space_behind_a_prompt():
    encoder = space_stripping_decoder()
    the, cat = encoder.token_to_id("▁the"), encoder.token_to_id("▁cat")
    assert encoder.decode([cat]) == "cat"
    assert streamed(encoder, [cat, the, cat], prompt=(the,)) == " cat the cat"


def test_a_character_of_several_byte_tokens_comes_whole():
    encoder = space_stripping_decoder()
    tokens = [encoder.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    stream = TextStream(encoder)
    assert [stream.push(token) for token in tokens] == ["", "", "你"]


# --- stop strings -------------------------------------------------------------------------------


class Pieces:
    """A decoder whose tokens are any texts."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.pieces[token] for token in token_ids)


PIECES = st.lists(st.text("ab\n", max_size=3), max_size=10)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(PIECES, STOPS)
def test_text_ends_before_the_first_stop_string_wherever_tokens_begin(pieces, stops):
    stream = TextStream(Pieces(pieces), stop=stops)
    text, given_out = "", ""
    for token, piece in enumerate(pieces):
        given_out += stream.push(token)
        text += piece
        ends = [text.index(stop) for stop in stops if stop in text]
        assert stream.stopped == bool(ends)
        if ends:
            assert given_out == text[: min(ends)]
            break
        assert text.startswith(given_out)
        held = text[len(given_out) :]
        assert any(stop.startswith(held) for stop in stops)  # held back only if it may become one
    assert given_out + stream.finish() == (text[: min(ends)] if stream.stopped else text)


# --- folders ------------------------------------------------------------------------------------


def test_a_prompt_gets_the_special_tokens_and_a_chat_only_those_of_its_template(tokenizer):
    assert tokenizer.encode("the cat")[0] == 0
    chat = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    assert chat.count(0) == 1


def test_a_chat_is_written_as_transformers_writes_it(folder, tokenizer):
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT,
    )
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "grüße <b>\n"},
    ]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat_text(messages) == expected


def test_a_template_that_refuses_or_fails_is_a_users_error(tokenizer):
    with pytest.raises(UsageError, match="no tools here"):
        tokenizer.chat_text([{"role": "tool", "content": ""}])
    with pytest.raises(UsageError, match="chat template"):
        tokenizer.chat_text([])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UsageError, match="chat template"):
        load_tokenizer(tmp_path).chat_text([{"role": "user", "content": ""}])


def test_a_model_without_a_template_takes_no_messages(tmp_path):
    write_folder(tmp_path, tokenizer_config={})
    with pytest.raises(UsageError, match="no chat template"):
        load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": ""}])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {1}),
        ({"config": {"eos_token_id": 7}}, {1, 7}),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 9]}}, {1, 8, 9}),
        ({"config": {"eos_token_id": [3]}, "generation_config": {}, "tokenizer_config": {}}, {3}),
    ],
)
def test_end_tokens_come_from_all_places_that_name_them(tmp_path, files, expected):
    assert load_tokenizer(write_folder(tmp_path, **files)).end_tokens == expected


def test_an_end_token_that_is_no_token_id_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(InvalidFile, match="eos_token_id"):
        end_tokens(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InvalidFile, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(tokenizer):
    check_vocab(tokenizer, tokenizer.vocab, "here")
    with pytest.raises(BundleMismatch, match="different models"):
        check_vocab(tokenizer, tokenizer.vocab - 1, "here")
