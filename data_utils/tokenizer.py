"""Text to token ids such that nothing a user wrote becomes a control token.

Control tokens are the tokenizer's special tokens and those added tokens that stand in the chat template's own
text. Every text of one in a user's string is *escaped* (replaced by private-use characters) before the template
runs. Encoding then uses a twin of the tokenizer whose control tokens have unguessable names: the control tokens
that the template wrote are renamed and parse as tokens, the escaped ones are put back and parse as plain text.
One encoding of the whole string, so metaspace tokenizers and lstrip/rstrip tokens behave as at inference.
"""

import json
import re
import secrets
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_utils.bpe import ByteLevelBPE, Differs, FastBPE
from data_utils.sources import DataError

DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
PROBE = "PROBE"  # an answer that stands in no template
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_turn>")
_JINJA_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_PRIVATE_USE = 0x100000  # plane 16; 65,534 characters that mean nothing in any text

PLAIN_CHATML = """\
{%- if messages and messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\n' + SYSTEM_MESSAGE + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def load_tokenizer(
    path: str,
    *,
    system_message: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a chat template gets plain ChatML, which is saved with the result.

    system_message: default system turn of that plain ChatML template ("You are a helpful assistant." if None).
    chat_template: file with a template to use instead of the tokenizer's own.
    chat_template_kwargs: JSON object of defaults for the template's variables. They become part of the template, so
        that every server that loads the result has them.

    Raises: DataError: no tokenizer there, no fast tokenizer, or no ChatML tokens for the default template.
    """
    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"{path}: no tokenizer in this directory (tokenizer.json); is it a checkpoint?")
    # `output/run` beside a directory `output` is a path mistyped, not a hub name to look up on the network.
    looks_local = path.count("/") != 1 or path[:1] in "./~" or directory.parent.is_dir()
    if not directory.is_dir() and looks_local:
        raise DataError(f"{path}: no such checkpoint directory, and not a hub name (owner/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot load a tokenizer: {str(error).strip().splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise DataError(f"{path}: only fast tokenizers are supported; convert it to a tokenizer.json first")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if not tokenizer.chat_template:
        missing = [text for text in ("<|im_start|>", "<|im_end|>") if text not in tokenizer.get_vocab()]
        if missing:
            raise DataError(
                f"{path}: the tokenizer has no chat template and its vocabulary lacks {', '.join(missing)} for plain "
                "ChatML; use a checkpoint that has them, or save a chat template with the tokenizer"
            )
        default = DEFAULT_SYSTEM_MESSAGE if system_message is None else system_message
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        written = [text for text in added if text.strip() and text in default]
        if written:
            raise DataError(f"--system_message: holds the control token {written[0]}, which it must not")
        tokenizer.chat_template = PLAIN_CHATML.replace("SYSTEM_MESSAGE", json.dumps(default, ensure_ascii=False))
    if chat_template_kwargs is not None:
        tokenizer.chat_template = _with_defaults(tokenizer.get_chat_template(), chat_template_kwargs)
    return tokenizer


def _read_template(path: str) -> str:
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat_template {path}: cannot be read: {error}") from None
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"--chat_template {path}:{error.lineno}: {error.message}") from None
    return template


def _with_defaults(template: str, kwargs: str) -> str:
    """The template with defaults for its variables; a server that passes a value still wins."""
    try:
        defaults = json.loads(kwargs)
    except json.JSONDecodeError as error:
        raise DataError(f"--chat_template_kwargs {kwargs}: invalid JSON: {error.msg}") from None
    if not isinstance(defaults, dict):
        raise DataError(f'--chat_template_kwargs {kwargs}: expected a JSON object such as {{"enable_thinking": false}}')
    head = ""
    for name, value in defaults.items():
        if name not in template:
            raise DataError(f"--chat_template_kwargs: the chat template has no variable {name}")
        if not name.isidentifier() or not isinstance(value, bool | int | float | str):
            raise DataError(f"--chat_template_kwargs: {name}: expected a name with true, false, a number or text")
        head += f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
    return head + template


class SafeEncoder:
    r"""Escape, encode, and the set of control tokens of one tokenizer and its chat template.

    control_ids: text -> id of every control token.
    can_be_fast: whether encode_batch_fast is worth a try.
    template_ids: ids of the control tokens that stand in the template's own text, ascending.

    Example: encode("<|im_start|>user\n" + escape("<|im_end|>")) holds the id of <|im_start|> and not of <|im_end|>.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        template = _JINJA_COMMENT.sub("", tokenizer.get_chat_template())
        added = tokenizer.added_tokens_decoder
        # White-space tokens (Gemma has some) stand in every template by chance and control nothing.
        self.control_ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content.strip() and (token.special or token.content in template)
        }
        missing = [text for text in _LOOKS_LIKE_CONTROL.findall(template) if text not in tokenizer.get_vocab()]
        if missing:
            raise DataError(
                f"the chat template writes {missing[0]}, which is no token of this tokenizer and would be read as "
                "plain text; use the template that belongs to the checkpoint"
            )
        self.template_ids = sorted(token_id for text, token_id in self.control_ids.items() if text in template)
        # In an assistant's turn markup such as <think> is what generation produces; what delimits turns is not.
        delimiters = _render_delimiters(tokenizer)
        self.markup = {
            token.content
            for token in added.values()
            if token.content in self.control_ids and not token.special and token.content not in delimiters
        }

        nonce = "".join(chr(_PRIVATE_USE + secrets.randbelow(0xFFF0)) for _ in range(8))
        self._mangled = (repr(nonce[0])[1:-1], json.dumps(nonce[0])[1:-1])
        # White space beside them is theirs, so that pieces are not encoded as wholes are.
        self.strips = any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        ordered = sorted(self.control_ids, key=len, reverse=True)
        self._escaped = {text: f"{nonce}{chr(_PRIVATE_USE + index)}" for index, text in enumerate(ordered)}
        renamed = {text: f"{nonce[::-1]}{chr(_PRIVATE_USE + index)}" for index, text in enumerate(ordered)}
        self._swap = {plain: text for text, plain in self._escaped.items()} | renamed
        self._user_pattern = _any_of(ordered)
        self._assistant_pattern = _any_of([text for text in ordered if text not in self.markup])
        self._swap_pattern = _any_of(sorted(self._swap, key=len, reverse=True))
        self._twin, self._original_ids, self._byte_level = _build_twin(tokenizer, renamed)
        largest = max(self._twin.get_vocab_size(), *self._original_ids, *added)
        table = np.arange(largest + 1, dtype=np.int32)
        for twin_id, token_id in self._original_ids.items():
            table[twin_id] = token_id
        is_same = np.array_equal(table, np.arange(len(table)))
        self._id_table = None if is_same else table
        self.can_be_fast = self._byte_level is not None
        self._bpe: FastBPE | None = None
        self._never_written = {renamed[text] for text in self.control_ids if text not in template}
        # A metaspace tokenizer marks the start of a piece: there, pieces must not be encoded apart.
        unsafe = self._find_unsafe(tokenizer)
        if unsafe is not None:
            raise DataError(f"this tokenizer reads {unsafe} as a control token wherever it stands; it is not supported")
        self.pieces_equal_whole = self.encode("a\nHello") == self.encode("a\n") + self.encode("Hello")

    def _find_unsafe(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        control = set(self.control_ids.values()) - {tokenizer.unk_token_id}
        return next((text for text in self.control_ids if control & set(self.encode(self.escape(text)))), None)

    def escape(self, text: str, role: str = "user") -> str:
        """Replace control-token texts by private-use characters; an assistant's markup stays."""
        pattern = self._assistant_pattern if role == "assistant" else self._user_pattern
        return pattern.sub(lambda match: self._escaped[match.group()], text)

    def encode(self, text: str) -> list[int]:
        """Ids of rendered, escaped text, encoded as one string."""
        ids = self._twin.encode(self.swap(text), add_special_tokens=False).ids
        return [self._original_ids.get(token_id, token_id) for token_id in ids]

    def swap(self, text: str) -> str:
        """Rendered, escaped text as the twin reads it: control tokens renamed, escaped ones plain again."""
        return self._swap_pattern.sub(lambda match: self._swap[match.group()], text)

    def encode_batch(self, swapped: list[str]) -> list[NDArray[np.int32]]:
        """Ids of texts that went through swap, on all cores."""
        return [self._as_array(ids) for ids in self._encode_plainly(swapped)]

    def encode_batch_fast(self, swapped: list[str]) -> list[NDArray[np.int32]]:
        """The same through a faster library, on one core.

        Raises: Differs: it does not agree with the tokenizer.
        """
        first = self._bpe is None
        if self._bpe is None:
            assert self._byte_level is not None
            self._bpe = self._byte_level.build(self._twin, self._never_written)
        if (bpe := self._bpe) is None:
            raise Differs
        ids = [bpe.encode(text) for text in swapped]
        # All of the first few are held against the tokenizer, and every 32nd after them.
        checked = [i for i, each in enumerate(ids) if each is None or i % 32 == 0 or (first and i < 256)]
        for index, expected in zip(checked, self._encode_plainly([swapped[i] for i in checked]), strict=True):
            if ids[index] is not None and ids[index] != expected:
                raise Differs
            ids[index] = expected
        return [self._as_array(each) for each in ids]

    def _encode_plainly(self, swapped: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._twin.encode_batch_fast(swapped, add_special_tokens=False)]

    def _as_array(self, ids: Any) -> NDArray[np.int32]:
        found = np.array(ids, dtype=np.int32)
        return found if self._id_table is None else self._id_table[found]

    def has_mangled_escape(self, rendered: str) -> bool:
        """Whether an escaped text was written in yet another escaped form (of JSON, say), which nothing turns back."""
        return any(form in rendered for form in self._mangled)

    def holds_control_text(self, text: str) -> bool:
        """Whether the text of a control token stands in it."""
        return self._user_pattern.search(text) is not None

    def after_last_control(self, text: str) -> str | None:
        """What stands behind the last control token of a rendered text, or None if there is none."""
        found = list(self._user_pattern.finditer(text))
        return text[found[-1].end() :] if found else None

    def encode_target(self, prompt: str, prompt_ids: list[int], target: str) -> list[int]:
        """Ids of what follows a prompt, with a cut where generation starts.

        Byte-level tokenizers encode the target apart. Where that differs from whole strings (metaspace), the ids
        after the prompt's are taken from the whole.
        """
        if self.pieces_equal_whole:
            return self.encode(target)
        whole = self.encode(prompt + target)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        # The whole string merges across the cut: encode behind a control token, which is no start of a text.
        return self.encode(next(iter(self.control_ids)) + target)[1:]


def _build_twin(
    tokenizer: PreTrainedTokenizerBase, renamed: dict[str, str]
) -> tuple[Tokenizer, dict[int, int], ByteLevelBPE | None]:
    """The tokenizer with its control tokens renamed, the way back to its ids, and what tiktoken needs of it."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    if state["model"].get("type") == "Unigram":  # it takes any piece of its vocabulary from plain text
        state["model"]["vocab"] = [[renamed.get(piece, piece), score] for piece, score in state["model"]["vocab"]]
    twin = Tokenizer.from_str(json.dumps(state))
    twin.no_truncation()
    twin.no_padding()
    added = tokenizer.added_tokens_decoder.items()
    names = {token_id: renamed.get(token.content, token.content) for token_id, token in added}
    twin_ids = {token_id: twin.token_to_id(name) for token_id, name in names.items()}
    original_ids = {twin_id: token_id for token_id, twin_id in twin_ids.items() if twin_id is not None}
    return twin, original_ids, ByteLevelBPE.find(state)


def _render_delimiters(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes around a user's turn and after an answer."""
    question = {"role": "user", "content": "Q"}
    try:
        asked = tokenizer.apply_chat_template([question], tokenize=False)
        answered = [question, {"role": "assistant", "content": PROBE}]
        return asked + tokenizer.apply_chat_template(answered, tokenize=False).rpartition(PROBE)[2]
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template cannot render a question and its answer: {error}") from None


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
