"""Load a tokenizer with its chat template."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file, chat_template_utils

from data_utils.model_path import explain_missing_model, find_template
from data_utils.new_tokens import add_new_tokens
from data_utils.qwen_tiktoken import VOCABULARY_FILE, load_qwen_tokenizer, needs_conversion
from data_utils.sources import DataError
from data_utils.template_source import explain_no_variable, find_variables

DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", VOCABULARY_FILE)
_TEXTS_ALONE = "{% for message in messages %}{{ message.content }}{% endfor %}"

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
    new_tokens: Sequence[str] = (),
    needs_template: bool = True,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a chat template gets plain ChatML, which is saved with the result.

    system_message: default system turn of that plain ChatML template ("You are a helpful assistant." if None).
    chat_template: file with a template to use instead of the tokenizer's own, or the name of one of templates/.
    chat_template_kwargs: JSON object of defaults for the template's variables. They become part of the template, so
        that every server that loads the result has them.
    new_tokens: special tokens to add, which conversations may use (new_tokens.py).
    needs_template: False: one without a chat template gets a template that writes the texts alone.

    Raises: DataError: no tokenizer there, no fast tokenizer, or no ChatML tokens for the default template.
    """
    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"{path}: no tokenizer in this directory (tokenizer.json); is it a checkpoint?")
    if mistake := explain_missing_model(path):
        raise DataError(mistake)
    tokenizer = _load(path, cache_dir, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise DataError(f"{path}: only fast tokenizers are supported; convert it to a tokenizer.json first")
    if new_tokens:
        add_new_tokens(tokenizer, new_tokens)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if not tokenizer.chat_template and not needs_template:
        tokenizer.chat_template = _TEXTS_ALONE
    # Plain ChatML, which converted checkpoints bring along, gets another default system turn as if it were not there.
    is_plain = tokenizer.chat_template == plain_chatml(DEFAULT_SYSTEM_MESSAGE)
    if not tokenizer.chat_template or (is_plain and system_message is not None):
        missing = [text for text in ("<|im_start|>", "<|im_end|>") if text not in tokenizer.get_vocab()]
        if missing:
            raise DataError(
                f"{path}: the tokenizer has no chat template and its vocabulary lacks {', '.join(missing)} for plain "
                "ChatML; name a file with a template: --chat_template FILE"
            )
        default = DEFAULT_SYSTEM_MESSAGE if system_message is None else system_message
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        written = [text for text in added if text.strip() and text in default]
        if written:
            raise DataError(f"--system_message: holds the control token {written[0]}, which it must not")
        tokenizer.chat_template = plain_chatml(default)
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        files = [f"{path}/additional_chat_templates/{name}.jinja" for name in named]
        file = next((file for file in files if Path(file).is_file()), "FILE")
        raise DataError(
            f"{path}: its chat templates have names ({', '.join(named)}) and none is the default; choose one: "
            f"--chat_template {file}"
        )
    if chat_template_kwargs is not None:
        tokenizer.chat_template = _with_defaults(named, chat_template_kwargs)
    return tokenizer


def plain_chatml(system_message: str) -> str:
    """The template of plain ChatML with a default system turn."""
    return PLAIN_CHATML.replace("SYSTEM_MESSAGE", json.dumps(system_message, ensure_ascii=False))


def _load(path: str, cache_dir: str | None, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as its files say; of an original Qwen checkpoint, without its code."""
    if needs_conversion(Path(path)):
        return load_qwen_tokenizer(Path(path))
    try:
        return AutoTokenizer.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the files may hold
        if not Path(path).is_dir() and (file := _find_original(path, cache_dir)) is not None:
            return load_qwen_tokenizer(file.parent)
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: cannot load a tokenizer: {line}") from error


def _find_original(name: str, cache_dir: str | None) -> Path | None:
    """The original Qwen's vocabulary in a hub repository, with what stands beside it."""
    try:
        file = cached_file(name, VOCABULARY_FILE, cache_dir=cache_dir)
    except OSError:
        return None
    cached_file(name, "generation_config.json", cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def _read_template(path: str) -> str:
    try:
        template = find_template(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat_template {path}: cannot be read: {error}") from None
    try:
        chat_template_utils._compile_jinja_template(template)  # the environment that renders it
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"--chat_template {path}:{error.lineno}: {error.message}") from None
    return template


def _with_defaults(template: str | dict[str, str], kwargs: str) -> str | dict[str, str]:
    """The template, or the named ones, with defaults for its variables; a server that passes a value still wins."""
    try:
        defaults = json.loads(kwargs)
    except json.JSONDecodeError as error:
        raise DataError(f"--chat_template_kwargs {kwargs}: invalid JSON: {error.msg}") from None
    if not isinstance(defaults, dict):
        raise DataError(f'--chat_template_kwargs {kwargs}: expected a JSON object such as {{"enable_thinking": false}}')
    templates = template if isinstance(template, dict) else {"": template}
    head = ""
    try:
        known = set().union(*map(find_variables, templates.values()))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from None
    for name, value in defaults.items():
        if name not in known:
            raise DataError(f"--chat_template_kwargs: {explain_no_variable(name, known)}")
        if not isinstance(value, bool | int | float | str):
            raise DataError(f"--chat_template_kwargs: {name}: expected a name with true, false, a number or text")
        head += f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
    found = {name: head + each for name, each in templates.items()}
    return found if isinstance(template, dict) else found[""]
