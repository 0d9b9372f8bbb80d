"""Whether a model's rows can be packed: by what its configuration says, and by trying it before training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tuning.distributed.processes import on_rank_0
from tuning.machine import is_out_of_memory
from tuning.messages import first_line
from tuning.model import attention
from tuning.model.attention import NAME
from tuning.model.recurrent import find_recurrent_layers, separate_rows
from tuning.model.training_model import TrainingModel


def enable_packing(training_model: TrainingModel, *, max_length: int, dtype: torch.dtype) -> str | None:
    """Switch a model to attention that keeps packed rows apart, if it passes the test. All processes must call this.

    max_length: tokens of the longest row. dtype: of the computation in training.

    Returns: None, or why its rows must be padded (the model is then left as it was).
    """
    obstacle = on_rank_0(lambda: _test_packing(training_model, max_length, dtype))
    if obstacle is None:
        training_model.causal_lm.set_attn_implementation(NAME)
        separate_rows(training_model.causal_lm)
    return obstacle


def _test_packing(training_model: TrainingModel, max_length: int, dtype: torch.dtype) -> str | None:
    if obstacle := find_obstacle(training_model, max_length):
        return obstacle
    causal_lm = training_model.causal_lm
    before = causal_lm.config._attn_implementation
    exact = dtype == torch.float32 and causal_lm.device.type == "cpu"
    separate_rows(causal_lm)
    try:
        with torch.autocast(causal_lm.device.type, dtype=dtype, enabled=dtype != torch.float32):
            reason = _try_packing(training_model, exact=exact)
            if reason is None and _has_short_window(training_model, max_length):
                causal_lm.set_attn_implementation(before)
                with _narrow_windows(causal_lm):
                    reason = _try_packing(training_model, exact=exact) or _miss_windows(training_model)
            return reason
    except NotImplementedError as error:  # attend says why
        return str(error) or "something in it is not implemented"
    except Exception as error:  # whatever a model does with arguments that it does not know
        if is_out_of_memory(error):
            raise
        message = first_line(error)
        return f"it does not take packed rows ({message})"
    finally:
        causal_lm.set_attn_implementation(before)


@torch.no_grad()
def _try_packing(training_model: TrainingModel, *, exact: bool) -> str | None:
    """Compare two short sequences packed and separate, and check that the first does not change the second's logits."""
    causal_lm = training_model.eval().causal_lm
    device = causal_lm.get_input_embeddings().weight.device
    first, other, second = (torch.arange(start, start + 8, device=device) % 13 + 1 for start in (0, 5, 9))
    starts = torch.tensor([0, 8, 16], dtype=torch.int32, device=device)
    position_ids = torch.arange(8, device=device).repeat(2)[None]

    def give_logits(*rows: Tensor, **packing: Any) -> Tensor:
        hidden = training_model.hidden_states(torch.cat(rows)[None], **packing)
        logits: Tensor = causal_lm.get_output_embeddings()(hidden)
        return logits[0].float()

    alone = torch.cat([give_logits(first), give_logits(second)])
    causal_lm.set_attn_implementation(NAME)
    packing = {"position_ids": position_ids, "lengths": [8, 8], "row_starts": starts}
    packed, beside_another = give_logits(first, second, **packing), give_logits(other, second, **packing)
    largest = alone.abs().max().item()
    influence = (packed - beside_another)[8:].abs().max().item() / largest
    # The same shapes go through the same kernels; only experts see other numbers of tokens.
    if not influence <= 1e-3:
        return f"packed, a row changes the logits of the next by {influence:.1g} of the largest one"
    difference = (alone - packed).abs().max().item() / largest
    if not difference <= (1e-4 if exact else 3e-2):
        return f"packed, its logits differ by {difference:.1g} of the largest one"
    return None


# ---- windows that are shorter than a row, which the short rows of the trial would not show ----

_NARROW = 4  # tokens; the trial's rows have 8


def _has_short_window(training_model: TrainingModel, max_length: int) -> bool:
    return any(window < max_length for _, window in _list_windows(training_model.causal_lm))


def _list_windows(causal_lm: PreTrainedModel) -> list[tuple[Any, int]]:
    """What holds a window (the configuration, layers), and how many tokens it has."""
    holders = [causal_lm.config.get_text_config(), *causal_lm.modules()]
    found = [(holder, getattr(holder, "sliding_window", None)) for holder in holders]
    return [(holder, window) for holder, window in found if isinstance(window, int) and not isinstance(window, bool)]


@contextlib.contextmanager
def _narrow_windows(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Inside, every window is narrower than the trial's rows, and attention notes which it is asked for."""
    changed = _list_windows(causal_lm)
    attention.windows_seen = []
    for holder, _ in changed:
        holder.sliding_window = _NARROW
    try:
        yield
    finally:
        attention.windows_seen = None
        for holder, window in changed:
            holder.sliding_window = window


def _miss_windows(training_model: TrainingModel) -> str | None:
    """Whether a layer with a window asks packed attention for none: it would see too far, if only in long rows."""
    config = training_model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    asked = (attention.windows_seen or []).count(_NARROW)
    expected = 2 * kinds.count("sliding_attention")  # two packed forwards
    return None if asked >= expected else "its attention does not say how far back it reaches"


def find_obstacle(training_model: TrainingModel, max_length: int) -> str | None:
    """Why the model cannot pack, by its configuration."""
    config = training_model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(config, "attn_temperature_tuning", False):
        return "it scales attention by the place in the micro-batch"
    kinds = list(getattr(config, "layer_types", None) or [])
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    recurrent = find_recurrent_layers(training_model.causal_lm)
    if kinds.count("linear_attention") == len(recurrent) or not kinds:
        known.add("linear_attention")
    if other := sorted({*kinds} - known):
        return f"it has layers of {other[0]}"
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in kinds and isinstance(chunk, int) and chunk < max_length:
        return f"its attention reaches back {chunk} tokens, and rows may have {max_length}"
    return None


def describe_rotary_switch(config: Any, max_length: int) -> str | None:
    """A warning if the rotary embedding switches with the longest sequence of a micro-batch, and the data is that long.

    A sequence's logits then depend on which sequences share its micro-batch, packed or padded.
    """
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in [found, *(value for value in found.values() if isinstance(value, dict))]:
        kind = str(rope.get("rope_type", rope.get("type")))
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if kind in ("longrope", "su", "dynamic") and limit and max_length > limit:
            return (
                f"rotary embedding {kind}: a micro-batch with a row beyond {limit:,} tokens computes its short rows "
                f"otherwise, too (as at inference with such prompts); --model_max_length {limit} avoids it"
            )
    return None
