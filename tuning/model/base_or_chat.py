"""Base or chat: whether a checkpoint has learnt the chat template's control tokens."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from tuning.model.stop_token import list_eos_ids
from tuning.model.token_rows import is_tied


@dataclass(frozen=True)
class Evidence:
    """Whether a checkpoint has learnt the chat template's control tokens, and what says so."""

    is_base: bool
    reasons: list[str]

    def describe(self) -> str:
        """One line for the log."""
        return f"{'base' if self.is_base else 'chat'} model: " + "; ".join(self.reasons)


def judge_base_or_chat(model: PreTrainedModel, stop_id: int, stop: str, vocabulary_size: int) -> Evidence:
    """Decide from evidence whether the checkpoint is a base model.

    Base, where the template's stop token does not end generation by the checkpoint's own configuration, or where
    its embedding or output row was never trained: near zero, or equal to the row of a token nothing ever uses.

    A model without storage (a plan) is judged by its configuration alone.

    vocabulary_size: ids from here on belong to no token (padding of the matrix).
    """
    generation = model.generation_config
    declared = {token_id for config in (generation, model.config) for token_id in list_eos_ids(config)}
    chatml = getattr(generation, "chat_format", None) == "chatml"
    ends = stop_id in declared or chatml
    if chatml:
        reasons = ["generation_config says chat_format chatml"]
    else:
        listed = ", ".join(map(str, sorted(declared))) or "none"
        reasons = [f"stop token {stop} ({stop_id}) {'ends' if ends else 'does not end'} generation (eos: {listed})"]
    untrained = False
    if model.get_input_embeddings().weight.is_meta:
        return Evidence(is_base=not ends, reasons=[*reasons, "its rows were not looked at"])
    matrices = {"embedding": model.get_input_embeddings().weight}
    if not is_tied(model):
        matrices["output"] = model.get_output_embeddings().weight
    for name, weight in matrices.items():
        verdict, reason = _judge_row(weight.detach(), stop_id, vocabulary_size)
        untrained = untrained or verdict
        reasons.append(f"its {name} row {reason}")
    return Evidence(is_base=not ends or untrained, reasons=reasons)


def _judge_row(weight: Tensor, row: int, vocabulary_size: int) -> tuple[bool, str]:
    norm = weight[row].float().norm().item()
    sample = weight[: min(vocabulary_size, len(weight)) : max(1, vocabulary_size // 4096)].float()
    median = sample.norm(dim=1).median().item()
    unused = weight[vocabulary_size:].float()
    if norm < 0.01 * median:
        return True, f"is untrained: its norm {norm:.3g} is near zero (median {median:.3g})"
    if len(unused) and (unused - weight[row].float()).norm(dim=1).min().item() < 0.01 * norm:
        return True, "is untrained: it equals a row no token uses"
    return False, f"has norm {norm:.3g} (median {median:.3g})"
