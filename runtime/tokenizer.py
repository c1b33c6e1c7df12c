"""Text to tokens and back: tokenizer.json, chat templates, end tokens, text that streams.

Streamed text is exact at every moment: what was given out never changes. So bytes of an unfinished
character wait for the rest, and text that may still become a stop string waits until it is clear.
"""

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Encoder

from plans.errors import BundleMismatch, InvalidFile, UsageError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 8
"""Prompt tokens that the first pieces are decoded behind: decoders strip a leading space."""
HELD_TOKENS_MAX = 32
"""After this many tokens without a clean end the bytes are no UTF-8 at all, and are given out."""


class Decoder(Protocol):
    """Turns tokens into text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        ...


class Tokenizer:
    """The tokenizer of a model's folder."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        special: Mapping[str, str],
        template: str | None,
        end_tokens: frozenset[int],
        where: str,
    ) -> None:
        """Parts as `load_tokenizer` reads them; `special` are named tokens such as bos_token."""
        self._encoder = encoder
        self._special = dict(special)
        self._template = _compiled(template, where) if template else None
        self._where = where
        self.end_tokens = end_tokens
        """Tokens that end an answer."""

    @property
    def vocab(self) -> int:
        """Tokens it knows, added ones included: one more than the largest id."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the model expects, such as BOS."""
        return list(self._encoder.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the model's answer begins."""
        # the template writes the special tokens itself
        return list(self._encoder.encode(self.chat_text(messages), add_special_tokens=False).ids)

    def chat_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's chat template writes it; raises UsageError."""
        if self._template is None:
            raise UsageError(
                f"{self._where} has no chat template, so messages mean nothing to this model; "
                "send a prompt"
            )
        try:
            return self._template.render(
                **self._special,
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses these messages: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"the chat template fails on these messages: {error!r}") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self._encoder.decode(list(token_ids), skip_special_tokens=True))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a model folder: tokenizer.json, and beside it whatever says more.

    End tokens are eos_token of tokenizer_config.json and eos_token_id (one or a list) of
    generation_config.json, or of config.json where that says nothing.
    Raises InvalidFile.
    """
    path = Path(folder)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InvalidFile(
            str(path), "", "holds no tokenizer.json; send token ids with --tokenizer none"
        )
    try:
        encoder = Encoder.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the Rust side raises nothing more special
        raise InvalidFile(str(file), "", f"cannot be read: {error}") from None
    encoder.no_truncation()  # saved by training scripts; a server must not cut prompts
    encoder.no_padding()
    config = _read_json(path / "tokenizer_config.json")
    special = {
        **{name: _token_text(value) for name, value in config.items() if name.endswith("_token")},
        **_read_json(path / "special_tokens_map.json"),
    }
    texts = {name: text for name, value in special.items() if (text := _token_text(value))}
    end = [encoder.token_to_id(texts["eos_token"])] if "eos_token" in texts else []
    return Tokenizer(
        encoder,
        special=texts,
        template=_chat_template(path, config),
        end_tokens=end_tokens(path) | {token for token in end if token is not None},
        where=str(path),
    )


def end_tokens(folder: str | Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json; empty where neither says."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(Path(folder) / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and each >= 0 for each in ids):
            raise InvalidFile(str(folder), f"{name}: eos_token_id", f"{value!r} is no token id")
        return frozenset(ids)
    return frozenset()


def check_vocab(tokenizer: Tokenizer, model_vocab: int, where: str) -> None:
    """Raises BundleMismatch where the tokenizer has tokens that the model has no row for."""
    if tokenizer.vocab > model_vocab:
        raise BundleMismatch(
            f"tokenizer {where} has {tokenizer.vocab} tokens, the plan's model {model_vocab}: "
            "they belong to different models; name the model's own folder with --tokenizer"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidFile(str(path), "", f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidFile(str(path), "", "is no JSON object")
    return value


def _token_text(value: Any) -> str | None:
    """A special token is saved as text or as an object that holds it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compiled(template: str, where: str) -> jinja2.Template:
    """The template in a sandbox: it comes with the weights, so it is data, not trusted code.

    Environment as in transformers (utils/chat_template_utils.py), which templates are written for.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InvalidFile(where, "chat template", str(error)) from None


def _to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().strftime(form)  # noqa: DTZ005 - local time, as templates expect


class TextStream:
    """Text of one answer as its tokens come.

    The pieces that push and finish return, joined, are the answer's text; `stopped` says that a
    stop string ended it. The stop string and what follows are not part of the text.
    """

    def __init__(
        self, decoder: Decoder, *, prompt: Sequence[int] = (), stop: Iterable[str] = ()
    ) -> None:
        """Starts behind a prompt; stop strings must not be empty."""
        context = list(prompt[-CONTEXT_TOKENS:])
        if context and decoder.decode(context).endswith(REPLACEMENT):
            context = []  # a prompt that ends inside a character; its rest is not the answer's
        self._decoder = decoder
        self._tokens = context  # what the next text is decoded from
        self._known = len(context)  # how many of them have been given out
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain now; empty while more is needed, or after a stop string."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._decoded(final=False))

    def finish(self) -> str:
        """The rest of the text, when no token will come."""
        if self.stopped:
            return ""
        text = self._release(self._decoded(final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _decoded(self, *, final: bool) -> str:
        """New text of the tokens, or nothing while the last character is unfinished."""
        before = self._decoder.decode(self._tokens[: self._known])
        text = self._decoder.decode(self._tokens)
        held = len(self._tokens) - self._known
        if text.endswith(REPLACEMENT) and not final and held < HELD_TOKENS_MAX:
            return ""
        if len(text) > len(before):
            # the last piece stays as context: decoders treat the first token of a text differently
            self._tokens = self._tokens[self._known :]
        self._known = len(self._tokens)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """Passes text on up to a stop string, or up to what may become one."""
        if not self._stop:
            return text
        text = self._held + text
        found = [at for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, each) for each in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
