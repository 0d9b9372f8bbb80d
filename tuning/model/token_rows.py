"""Trained vocabulary rows of the embedding and output matrices, kept apart from the frozen matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

PEFT_SUFFIX = "token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """Trainable rows of the embedding and output matrices, kept beside the frozen matrices.

    Rows are put in place after the lookup, and their logits after the projection: no copy of a matrix is made.

    token_ids: [R]. embedding: [R, H] parameter. output: [R, H] parameter, None where the matrices are tied (then
    `embedding` serves both). Kept in float32.
    """

    token_ids: Tensor
    row_of_token: Tensor

    def __init__(self, model: PreTrainedModel, token_ids: list[int]):
        super().__init__()
        self.tied = is_tied(model)
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        self.names = {"embedding": find_module_name(model, embedding), "output": find_module_name(model, output)}
        device = embedding.weight.device
        ids = torch.tensor(token_ids, device=device)
        row_of_token = torch.full((len(embedding.weight),), -1, dtype=torch.long, device=device)
        row_of_token[ids] = torch.arange(len(ids), device=device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("row_of_token", row_of_token, persistent=False)
        self.embedding = nn.Parameter(embedding.weight.detach()[ids].float().clone())
        self.output = None if self.tied else nn.Parameter(output.weight.detach()[ids].float().clone())
        # Gemma scales in the embedding's forward; rows replace its result and must be scaled alike.
        self._scale = getattr(embedding, "embed_scale", None)
        # Called as a module, so that ZeRO-3 gathers the rows. Its own hooks on both layers come after these.
        self._hooks = [
            embedding.register_forward_hook(lambda _, inputs, result: self("embedding", inputs[0], result)),
            output.register_forward_hook(lambda _, inputs, result: self("output", inputs[0], result)),
        ]

    def forward(self, part: str, inputs: Tensor | None = None, result: Tensor | None = None) -> Tensor:
        """Put the trained rows in place.

        Shapes: part "embedding": inputs [...] ids, result [..., H]; part "output": inputs [..., H], result [..., V];
        part "rows": nothing; returns the rows of the output matrix, [R, H].
        """
        if part == "rows":
            return self.output_rows.clone()  # ZeRO-3 takes the parameter itself away again
        assert inputs is not None and result is not None
        if part == "embedding":
            row = self.row_of_token[inputs]
            rows = F.embedding(row.clamp(min=0), self.embedding).to(result.dtype)
            if self._scale is not None:
                rows = rows * torch.as_tensor(self._scale).to(rows)
            return torch.where((row >= 0).unsqueeze(-1), rows, result)
        if not result.ndim:  # a scalar: the output layer returned the loss, which used the rows (OutputHead)
            return result
        columns = F.linear(inputs, self.output_rows.to(inputs.dtype))
        return result.index_copy_(-1, self.token_ids, columns.to(result.dtype))

    @property
    def output_rows(self) -> Tensor:
        """The rows of the output matrix, [R, H]; in engines that shard weights only inside forward."""
        return self.embedding if self.output is None else self.output

    def state_in_peft_format(self) -> dict[str, Tensor]:
        """Absolute rows under peft's names; tied matrices have the embedding's only."""
        parts = {"embedding": self.embedding, "output": self.output}
        named = {f"base_model.model.{self.names[part]}.{PEFT_SUFFIX}": rows for part, rows in parts.items()}
        return {name: rows for name, rows in named.items() if rows is not None}

    def indices_in_peft_format(self) -> list[int] | dict[str, list[int]]:
        """What peft's LoraConfig.trainable_token_indices holds for these rows."""
        ids = self.token_ids.tolist()
        if self.tied:
            return ids
        return {name.rpartition(".")[2]: ids for name in self.names.values()}

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
                    module.weight[self.token_ids] = rows.to(module.weight.dtype)

    @torch.no_grad()
    def load(self, part: str, token_ids: list[int], values: Tensor) -> None:
        """Take rows of "embedding" or "output". Shapes: values [len(token_ids), H]."""
        parameter = getattr(self, part)
        if not parameter.is_meta:
            places = self.row_of_token[torch.tensor(token_ids, device=self.row_of_token.device)]
            parameter[places] = values.to(parameter)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and output layer share one matrix."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def find_module_name(model: nn.Module, module: nn.Module) -> str:
    """Dotted name of a module inside a model."""
    return next(name for name, candidate in model.named_modules() if candidate is module)
