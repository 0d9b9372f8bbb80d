"""The token that ends generation: which one it is, and that the saved result ends with it."""

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tuning.errors import SettingsError, explain_bad_files
from tuning.messages import first_line

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def align_stop_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stop_id: int, is_base: bool
) -> GenerationConfig:
    """Make the saved result stop on the token it was trained to stop on. Returns its generation config.

    The stop token comes first in eos_token_id; what the checkpoint had stays. A base model's tokenizer and config
    take it as their eos token too: converters and servers read it from there.
    """
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    others = list_eos_ids(config)
    ids = [stop_id, *(token_id for token_id in others if token_id != stop_id)]
    config.eos_token_id = ids if len(ids) > 1 else stop_id
    if tokenizer.pad_token_id is None or (is_base and tokenizer.pad_token_id == stop_id):
        tokenizer.pad_token_id = others[0] if others else stop_id
    config.pad_token_id = tokenizer.pad_token_id
    if is_base:
        eos_token, rendered = tokenizer.eos_token, _render_probe(tokenizer)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop_id)
        if _render_probe(tokenizer) != rendered:  # a template that writes {{ eos_token }} would say something else
            tokenizer.eos_token = eos_token
        model.config.get_text_config().eos_token_id = stop_id
    if not config.do_sample:
        for name in _SAMPLING:  # void without sampling, and transformers refuses to save them
            setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise SettingsError(
            f"the checkpoint's generation_config.json cannot be saved again: {first_line(error)}"
        ) from None
    model.generation_config = config
    return config


def _render_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q"},
    ]
    with explain_bad_files("the chat template cannot render two questions and an answer"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def list_eos_ids(config: Any) -> list[int]:
    """Tokens that end generation, by a model's or a generation config: an id, several, or none."""
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
