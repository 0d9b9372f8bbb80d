"""Trained vocabulary rows of the embedding and output matrices, kept apart from the frozen matrices."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

PEFT_SUFFIX = "token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """Trainable rows of the embedding and output matrices, kept beside the frozen matrices.

    Rows are put in place after the lookup, and their logits after the projection: no copy of a matrix is made. A matrix
    whose rows do not train is left alone, whatever else is done to it.

    token_ids: of "embedding", of "output", or of both; of tied matrices those of "embedding" serve both.

    embedding, output: [R, H] parameters in float32; None where no row of that matrix trains (or the matrices are tied,
    for output).
    """

    embedding: nn.Parameter | None
    output: nn.Parameter | None
    row_of_token: Tensor

    def __init__(self, model: PreTrainedModel, token_ids: dict[str, list[int]]):
        super().__init__()
        self.tied = is_tied(model)
        self.enabled = True  # False: the matrices stay as they are
        layers = {"embedding": model.get_input_embeddings(), "output": model.get_output_embeddings()}
        self.names = {part: find_module_name(model, layer) for part, layer in layers.items()}
        self._hooks = []
        for part, layer in layers.items():
            ids = token_ids.get("embedding" if self.tied else part) or []
            own = ids if part == "embedding" or not self.tied else []
            self.register_parameter(part, _copy_rows(layer, own) if own else None)
            self.register_buffer(
                f"{part}_ids", torch.tensor(ids, dtype=torch.long, device=layer.weight.device), persistent=False
            )
            if ids:
                # Called as a module, so that ZeRO-3 gathers the rows. Its own hooks on both layers come after these.
                self._hooks.append(layer.register_forward_hook(functools.partial(self._put_in_place, part)))
        row_of_token = torch.full((len(layers["embedding"].weight),), -1, dtype=torch.long)
        row_of_token = row_of_token.to(layers["embedding"].weight.device)
        row_of_token[self.ids_of("embedding")] = torch.arange(len(self.ids_of("embedding")), device=row_of_token.device)
        self.register_buffer("row_of_token", row_of_token, persistent=False)
        # Gemma scales in the embedding's forward; rows replace its result and must be scaled alike.
        self._scale = getattr(layers["embedding"], "embed_scale", None)

    def ids_of(self, part: str) -> Tensor:
        """Token ids [R] whose rows train in "embedding" or in "output"."""
        ids: Tensor = getattr(self, f"{part}_ids")
        return ids

    def _put_in_place(self, part: str, _layer: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        replaced: Tensor = self(part, inputs[0], result)
        return replaced

    def forward(self, part: str, inputs: Tensor | None = None, result: Tensor | None = None) -> Tensor:
        """Put the trained rows in place.

        Shapes: part "embedding": inputs [...] ids, result [..., H]; part "output": inputs [..., H], result [..., V];
        part "rows": nothing; returns the rows of the output matrix, [R, H].
        """
        if part == "rows":
            return self.output_rows.clone()  # ZeRO-3 takes the parameter itself away again
        assert inputs is not None and result is not None
        if not self.enabled:
            return result
        if part == "embedding":
            assert self.embedding is not None
            row = self.row_of_token[inputs]
            rows = F.embedding(row.clamp(min=0), self.embedding).to(result.dtype)
            if self._scale is not None:
                rows = rows * torch.as_tensor(self._scale).to(rows)
            return torch.where((row >= 0).unsqueeze(-1), rows, result)
        if not result.ndim:  # a scalar: the output layer returned the loss, which used the rows (OutputHead)
            return result
        columns = F.linear(inputs, self.output_rows.to(inputs.dtype))
        return result.index_copy_(-1, self.ids_of("output"), columns.to(result.dtype))

    @property
    def output_rows(self) -> Tensor:
        """The rows of the output matrix, [R, H]; in engines that shard weights only inside forward."""
        rows = self.embedding if self.tied else self.output
        assert rows is not None
        return rows

    def state_in_peft_format(self) -> dict[str, Tensor]:
        """Absolute rows under peft's names; tied matrices have the embedding's only."""
        parts = {"embedding": self.embedding, "output": self.output}
        named = {f"base_model.model.{self.names[part]}.{PEFT_SUFFIX}": rows for part, rows in parts.items()}
        return {name: rows for name, rows in named.items() if rows is not None}

    def indices_in_peft_format(self) -> list[int] | dict[str, list[int]]:
        """What peft's LoraConfig.trainable_token_indices holds for these rows."""
        ids: dict[str, list[int]] = {part: self.ids_of(part).tolist() for part in self.names}
        if self.tied:
            return ids["embedding"]
        return {self.names[part].rpartition(".")[2]: each for part, each in ids.items() if each}

    def write_into(self, model: PreTrainedModel) -> None:
        """Write the rows into the model's matrices and stop substituting them."""
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for part, module in (
                ("embedding", model.get_input_embeddings()),
                ("output", model.get_output_embeddings()),
            ):
                if (rows := getattr(self, part)) is not None:
                    module.weight[self.ids_of(part)] = rows.to(module.weight.dtype)

    @torch.no_grad()
    def load(self, part: str, values: Tensor) -> None:
        """Take the rows of "embedding" or "output". Shapes: values [R, H]."""
        parameter = getattr(self, part)
        if not parameter.is_meta:
            parameter.copy_(values.to(parameter))


def _copy_rows(layer: nn.Module, ids: list[int]) -> nn.Parameter:
    weight: Any = layer.weight
    return nn.Parameter(weight.detach()[torch.tensor(ids, device=weight.device)].float().clone())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and output layer share one matrix."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def find_module_name(model: nn.Module, module: nn.Module) -> str:
    """Dotted name of a module inside a model."""
    return next(name for name, candidate in model.named_modules() if candidate is module)
