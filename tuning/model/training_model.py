"""The module that training engines wrap: a causal language model whose forward returns the loss sum."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tuning.errors import SettingsError
from tuning.machine import is_out_of_memory
from tuning.messages import first_line
from tuning.model.attention import NAME, attend, describe_packing, rows_lie_apart
from tuning.model.divergence import Start, compare_with_base, compare_with_start, keep_start
from tuning.model.loss import OutputHead, change_logits, chunk_rows, find_logit_change
from tuning.model.norm_rotary import fuse_elementwise
from tuning.model.quantized_linear import QuantizedLinear
from tuning.model.token_rows import TokenRows


class TrainingModel(nn.Module):
    """What DDP, DeepSpeed and FSDP wrap: a causal language model whose forward returns the loss sum.

    model: the transformers model, or the peft model around it. Its parameter names stay as they are.
    token_rows: trained rows of the embedding and output matrices, or None.
    records_rows: each forward in training leaves row_losses: [R], the summed loss of each row, without weights.

    Raises: SettingsError: see loss.OutputHead.
    """

    def __init__(self, model: nn.Module, token_rows: TokenRows | None = None):
        super().__init__()
        self.model: Any = model
        fuse_elementwise(self.causal_lm)
        self.token_rows = token_rows
        self.records_rows = False
        self.row_losses: Tensor | None = None
        self._head = OutputHead(self.causal_lm.get_output_embeddings(), token_rows, find_logit_change(self.config))

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        """The model's configuration, which training engines look for."""
        return self.causal_lm.config

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, by the class names that transformers keeps for this purpose."""
        names = set(getattr(self.causal_lm, "_no_split_modules", None) or [])
        return [module for module in self.causal_lm.modules() if type(module).__name__ in names]

    def forward(
        self,
        input_ids: Tensor,
        target_index: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        position_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        row_starts: Tensor | None = None,
        target_rows: Tensor | None = None,
        general: Start | str | None = None,
    ) -> Any:
        """Summed cross-entropy of the micro-batch.

        Shapes: input_ids [B, T]; target_index [N], positions in the flattened [B * T]; targets [N]; weights [N] of the
            targets' losses, or None where all are 1; target_rows [N] int32, the row of each. Packed rows (see
            attention.py): input_ids and position_ids [1, T], lengths of the R rows, row_starts [R + 1] int32.
        general: measure the divergence from the start instead (divergence.py): "start" gives a Start; a Start, or
            "base" of an adapter, gives [N, 3].

        Returns: scalar.
        """
        hidden = self.hidden_states(input_ids, position_ids, lengths, row_starts)
        supervised = hidden.flatten(0, 1).index_select(0, target_index)
        if general is not None:
            chunk = chunk_rows(len(targets), self._head.num_logits, targets.device.type)
            if general == "base":
                with self.without_adapter():
                    base = self.hidden_states(input_ids, position_ids, lengths, row_starts)
                base = base.flatten(0, 1).index_select(0, target_index)
                return compare_with_base(
                    supervised, base, targets, self._log_probabilities, self._base_log_probabilities, chunk
                )
            if isinstance(general, Start):
                return compare_with_start(supervised, targets, self._log_probabilities, general, chunk)
            return keep_start(supervised, targets, self._log_probabilities, chunk)
        if target_rows is None or not (self.records_rows and self.training):
            return self._head.sum_loss(supervised, targets, weights)
        losses = torch.zeros(len(targets), device=targets.device)
        total = self._head.sum_loss(supervised, targets, weights, losses)
        num_rows = len(input_ids) if lengths is None else len(lengths)
        self.row_losses = losses.new_zeros(num_rows).index_add_(0, target_rows, losses)
        return total

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        row_starts: Tensor | None = None,
    ) -> Tensor:
        """What the output layer sees, [B, T, H]; inputs as in forward."""
        decoder = self.causal_lm.get_decoder()
        if lengths is not None:
            packing = describe_packing(input_ids, position_ids, lengths, row_starts)
            hidden: Tensor = decoder(input_ids=input_ids, use_cache=False, **packing)[0]
            return hidden
        with rows_lie_apart():
            hidden = decoder(input_ids=input_ids, use_cache=False)[0]
        return hidden

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        logits = self.causal_lm.get_output_embeddings()(hidden).float()
        change_logits(logits, find_logit_change(self.config))
        return torch.log_softmax(logits, -1)

    def _base_log_probabilities(self, hidden: Tensor) -> Tensor:
        with self.without_adapter():
            return self._log_probabilities(hidden)

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, causal_lm is the base: LoRA, matrices that train whole, and vocabulary rows take no part.

        Its logits are; the loss is not.
        """
        layers = [m for m in self.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        # Not by peft's own context, which sets requires_grad of all that it passes.
        for layer in layers:
            layer._disable_adapters = True
        if self.token_rows is not None:
            self.token_rows.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
            if self.token_rows is not None:
                self.token_rows.enabled = True


@torch.no_grad()
def check_loss_path(training_model: TrainingModel) -> None:
    """Check that TrainingModel's loss and logits equal the model's own on a few tokens.

    Some architectures change their logits after the output layer in ways that are not known here, or are built in
    another way than decoder and output layer. The loss would be wrong in silence.

    Raises: SettingsError: they differ.
    """
    causal_lm = training_model.eval().causal_lm
    name = type(causal_lm).__name__
    ids = torch.arange(1, 9, device=next(causal_lm.parameters()).device).unsqueeze(0)
    try:
        logits = causal_lm(input_ids=ids).logits.float()
        expected = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        by_layer = causal_lm.get_output_embeddings()(training_model.hidden_states(ids)).float()
        change_logits(by_layer, find_logit_change(causal_lm.config))
        actual = training_model(ids, torch.arange(7, device=ids.device), ids[0, 1:]).item()
    except (TypeError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise SettingsError(f"{name}: not built as decoder and output layer ({error}); not supported yet") from None
    half = causal_lm.dtype != torch.float32
    same_logits = by_layer.shape == logits.shape and torch.allclose(
        by_layer, logits, rtol=0, atol=(3e-2 if half else 1e-3) * logits.abs().max().item()
    )
    if not same_logits or not math.isclose(actual, expected, rel_tol=1e-2 if half else 1e-4):
        raise SettingsError(_describe_other_logits(name, f"loss {expected:.4f}, by the layer alone {actual:.4f}"))


def _describe_other_logits(name: str, evidence: str) -> str:
    return (
        f"{name}: its logits are not its output layer's ({evidence}); an architecture that changes logits in this way "
        "is not supported yet"
    )


def trains_row(training_model: TrainingModel, token_id: int) -> bool:
    """Whether the embedding's row of a token trains: with the whole matrix, or as one of the token rows."""
    rows = training_model.token_rows
    if rows is not None and token_id in rows.ids_of("embedding").tolist():
        return True
    embedding = training_model.causal_lm.get_input_embeddings()
    return any(parameter.requires_grad for parameter in embedding.parameters())


def check_positions(training_model: TrainingModel, longest: int) -> None:
    """Raises: SettingsError: a row is longer than a table of learned positions."""
    causal_lm = training_model.causal_lm
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    tokens = causal_lm.get_input_embeddings()
    inside = {id(module) for module in tokens.modules()}
    learned = [m for m in causal_lm.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
    if learned and positions is not None and longest > positions:
        raise SettingsError(
            f"a row has {longest} tokens, the model learnt {positions} positions; pass --model_max_length {positions}"
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Non-reentrant: works with frozen inputs and with hooks."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers >= 5.20
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(training_model: TrainingModel) -> None:
    """Let torch.compile fuse what a decoder layer does beside its attention.

    It compiles twice at the first step, for the first layer and for the others, and again at the first evaluation.

    Raises: SettingsError: it does not work here, or would compile nothing.
    """
    if any(getattr(layer, "gradient_checkpointing", False) for layer in training_model.layers):
        raise SettingsError("torch.compile takes no layer whose activations are recomputed")
    device = next(training_model.parameters()).device
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, no Triton, a GPU that is too old
        raise SettingsError(
            f"--compile_layers: torch.compile does not work here ({first_line(error)}); leave it out"
        ) from None
    # Outside of what is compiled, since it works on each row by itself.
    AttentionInterface.register(NAME, torch.compiler.disable(attend))
    for layer in training_model.layers:
        layer.compile(dynamic=True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; tied ones count once, quantised ones as in_features x out_features."""
    packed = {m.weight: m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)}
    parameters = list(model.parameters())
    total = sum(packed.get(p) or p.numel() for p in parameters)
    return sum(p.numel() for p in parameters if p.requires_grad), total
