"""Whether a model's rows can be packed: by what its configuration says, and by trying it before training."""

from typing import Any

import torch
from torch import Tensor

from tuning.distributed.processes import on_rank_0
from tuning.machine import is_out_of_memory
from tuning.messages import first_line
from tuning.model.attention import NAME
from tuning.model.training_model import TrainingModel


def enable_packing(training_model: TrainingModel, *, max_length: int, dtype: torch.dtype) -> str | None:
    """Switch a model to attention that keeps packed rows apart, if it passes the test. All processes must call this.

    max_length: tokens of the longest row. dtype: of the computation in training.

    Returns: None, or why its rows must be padded (the model is then left as it was).
    """
    obstacle = on_rank_0(lambda: _test_packing(training_model, max_length, dtype))
    if obstacle is None:
        training_model.causal_lm.set_attn_implementation(NAME)
    return obstacle


def _test_packing(training_model: TrainingModel, max_length: int, dtype: torch.dtype) -> str | None:
    if obstacle := find_obstacle(training_model, max_length):
        return obstacle
    causal_lm = training_model.causal_lm
    before = causal_lm.config._attn_implementation
    try:
        with torch.autocast(causal_lm.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return _try_packing(training_model, exact=dtype == torch.float32 and causal_lm.device.type == "cpu")
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


def find_obstacle(training_model: TrainingModel, max_length: int) -> str | None:
    """Why the model cannot pack, by its configuration (a window below max_length, which short rows would not show)."""
    config = training_model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if getattr(config, "attn_temperature_tuning", False):
        return "it scales attention by the place in the micro-batch"
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    kinds = set(getattr(config, "layer_types", None) or [])
    if other := sorted(kinds - {"full_attention", *windows}):
        return f"it has layers of {other[0]}"
    reaches = [getattr(config, name, None) for kind, name in windows.items() if kind in kinds or not kinds]
    reaches += [getattr(module, "sliding_window", None) for module in training_model.causal_lm.modules()]
    short = [reach for reach in reaches if isinstance(reach, int) and reach < max_length]
    return f"its attention reaches back {min(short)} tokens, and rows may have {max_length}" if short else None


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
