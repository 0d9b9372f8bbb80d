"""The loss of one micro-batch: cross-entropy summed over its supervised tokens, without keeping their logits.

Logits are V numbers a token, often more than everything else of it together. Here they exist for a few hundred rows
at a time: each chunk is projected, its softmax and gradients are computed in forward, and only gradients are kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuning.errors import SettingsError
from tuning.machine import memory_limit
from tuning.model.token_rows import TokenRows

# Logits that exist at a time: 256 MB of fp32 on a CPU, where half as many are slower and twice as many cost memory
# (benchmarks/LOG.md). On GPUs, where each takes 6 bytes, 1 % of the device's memory: not measured yet.
_CPU_LOGITS = 2**26
_BYTES_PER_LOGIT = 640  # of the device's memory
_FEWEST_LOGITS, _USUAL_MEMORY = 2**25, 80 * 2**30

# On gradients of logits in fp16, whose smallest number is 6e-8.
_FP16_SCALE = 1024.0


class LogitChange(NamedTuple):
    """What an architecture does to its logits after the output layer: cap * tanh(scale * logits / cap)."""

    scale: float = 1.0
    cap: float | None = None


UNCHANGED = LogitChange()


def find_logit_change(config: Any) -> LogitChange:
    """How a model changes its logits, by the fields that architectures have for it.

    Gemma-2's final_logit_softcapping, Cohere's logit_scale, Granite's logits_scaling (a divisor), Falcon-H1's
    lm_head_multiplier.
    """
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= _read_number(config, name) or 1.0
    scale /= _read_number(config, "logits_scaling") or 1.0
    return LogitChange(scale, _read_number(config, "final_logit_softcapping"))


def _read_number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class OutputHead:
    """A model's output layer, able to compute the loss inside its own forward.

    There the engines that hooked the layer (ZeRO-3, FSDP) have its weight at hand; outside they have not. Called
    with hidden states alone the layer gives logits as ever.

    token_rows: vocabulary rows that train in place of the layer's own. change: of the logits behind the layer.

    Raises: SettingsError: an output layer that is not linear.
    """

    def __init__(self, layer: nn.Module, token_rows: TokenRows | None, change: LogitChange = UNCHANGED):
        self._change = change
        if isinstance(layer, ModulesToSaveWrapper):
            layer = layer.modules_to_save["default"]
        self._adapter = layer if isinstance(layer, LoraLinear) else None
        linear = layer.get_base_layer() if isinstance(layer, LoraLinear) else layer
        if not isinstance(linear, nn.Linear):
            raise SettingsError(f"the output layer is a {type(linear).__name__}; only linear ones are supported yet")
        adapter = self._adapter
        if adapter is not None and (adapter.lora_variant or adapter.lora_B["default"].bias is not None):
            raise SettingsError("a variant of LoRA (DoRA, a bias) on the output layer is not supported")
        self._linear, self._token_rows = linear, token_rows
        self.num_logits = linear.out_features
        # Not an argument of the layer's forward: engines cast and copy those.
        self._target_losses: Tensor | None = None
        self._compute_logits: Callable[..., Tensor] = linear.forward
        linear.forward = self._forward  # type: ignore[method-assign, assignment]

    def sum_loss(
        self, hidden: Tensor, targets: Tensor, weights: Tensor | None, target_losses: Tensor | None = None
    ) -> Tensor:
        """Summed cross-entropy.

        Shapes: hidden [N, H], targets [N], weights [N] of the targets' losses, or None. target_losses: [N] float32,
        gets each target's loss, without its weight.
        """
        self._target_losses = target_losses
        low_rank = None
        if (adapter := self._adapter) is not None:
            down, up = adapter.lora_A["default"], adapter.lora_B["default"]
            inputs = adapter.lora_dropout["default"](hidden.to(down.weight.dtype))
            # The weight through a call of its layer: engines gather it for that.
            up_weight = up(torch.eye(up.in_features, dtype=up.weight.dtype, device=hidden.device)).t()
            low_rank = (down(inputs) * adapter.scaling["default"], up_weight)
        trained, rows = self._token_rows, None
        if trained is not None and len(trained.ids_of("output")):
            rows = (trained.ids_of("output"), trained("rows"))
        return self._linear(hidden, targets, weights, low_rank, rows)

    def _forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if targets is None:
            return self._compute_logits(hidden)
        linear = self._linear
        return sum_cross_entropy(
            hidden,
            linear.weight,
            targets,
            bias=linear.bias,
            weights=weights,
            rows=rows,
            low_rank=low_rank,
            change=self._change,
            target_losses=self._target_losses,
        )


def chunk_rows(num_rows: int, num_logits: int, device_type: str, device_memory: int | None = None) -> int:
    """Supervised tokens per chunk: num_rows split evenly so that a chunk's logits stay within what a device is given.

    num_logits: of a token. device_memory: bytes that the device has; None: as many as GPUs for this have, 80 GiB.
    """
    logits = max(_FEWEST_LOGITS, (device_memory or _USUAL_MEMORY) // _BYTES_PER_LOGIT)
    limit = max(1, (_CPU_LOGITS if device_type == "cpu" else logits) // num_logits)
    return -(-num_rows // -(-num_rows // limit)) if num_rows else 1


def sum_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    change: LogitChange = UNCHANGED,
    target_losses: Tensor | None = None,
) -> Tensor:
    """Project hidden states and sum their cross-entropy; gradients are computed along with it.

    A sum, not a mean: the division by the step's number of tokens (and fp16's loss scale) arrive through
    grad_output, where they lose no precision. Products are in autocast's dtype (else hidden's), softmax and sum in
    float32. Only what requires a gradient gets one: a frozen weight costs none.

    hidden: [N, H]. N may be 0, the sum is then 0 with zero gradients.
    weight: [V, H]. bias: [V].
    targets: [N].
    weights: [N], of the targets' losses.
    rows: (token ids [R], [R, H]) in place of those rows of weight.
    low_rank: (a [N, r], b [V, r]): a @ b.T is added to the logits.
    change: what is done to the logits before the softmax.
    target_losses: [N] float32, gets each target's loss, without its weight.

    Returns: scalar float32.
    """
    token_ids, row_weight = rows or (None, None)
    low_input, low_weight = low_rank or (None, None)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        loss: Tensor = _SumCrossEntropy.apply(
            (dtype, torch.is_grad_enabled(), change),
            (targets, weights, token_ids, target_losses),
            hidden,
            weight,
            bias,
            row_weight,
            low_input,
            low_weight,
        )
    return loss


def change_logits(logits: Tensor, change: LogitChange) -> Tensor | float | None:
    """Change logits in place. Returns: the derivative by the logits as they came; None where it is 1."""
    scale, cap = change
    if cap is None:
        if scale == 1.0:
            return None
        logits.mul_(scale)
        return scale
    # tanh near its ends keeps too little in half precision: in float32, as the softmax is.
    bent = torch.tanh(logits.float() * (scale / cap))
    logits.copy_(bent * cap)
    return bent.square_().neg_().add_(1.0).mul_(scale)


class _SumCrossEntropy(torch.autograd.Function):
    """Trainable inputs: hidden [N, H], weight [V, H], bias [V], rows [R, H], low_input [N, r], low_weight [V, r]."""

    @staticmethod
    def forward(ctx: Any, options: tuple, constants: tuple, *inputs: Tensor | None) -> Tensor:
        (dtype, with_gradients, change), (targets, weights, token_ids, target_losses) = options, constants
        hidden, weight, bias, rows, low_input, low_weight = (None if x is None else x.to(dtype) for x in inputs)
        assert hidden is not None and weight is not None and (low_input is None) == (low_weight is None)
        num_rows, num_logits = len(hidden), len(weight)
        needed = ctx.needs_input_grad[2:] if with_gradients else [False] * len(inputs)
        # Matrices' gradients gather over chunks, so in float32.
        gradients = [
            None if x is None or not need else torch.zeros_like(x, dtype=torch.float32)
            for x, need in zip(inputs, needed, strict=True)
        ]
        d_hidden, d_weight, d_bias, d_rows, d_low_input, d_low_weight = gradients
        device_memory = memory_limit(hidden.device) if hidden.is_cuda else None
        chunk = chunk_rows(num_rows, num_logits, hidden.device.type, device_memory)
        # One buffer for all chunks: on CPU new memory costs about as much as the softmax.
        buffer = hidden.new_empty(min(chunk, num_rows), num_logits)
        in_place = dtype == torch.float32 and hidden.device.type == "cpu"
        probabilities_buffer = buffer if in_place else torch.empty_like(buffer, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, num_rows, chunk):
            part = slice(start, start + chunk)
            hidden_part, target = hidden[part], targets[part, None]
            logits = torch.mm(hidden_part, weight.t(), out=buffer[: len(hidden_part)])
            if bias is not None:
                logits += bias
            if rows is not None:
                logits.index_copy_(1, token_ids, hidden_part @ rows.t())
            if low_input is not None and low_weight is not None:
                logits.addmm_(low_input[part], low_weight.t())
            slope = change_logits(logits, change)  # of the logits that the softmax sees over the layer's
            largest, target_logit = logits.amax(1, keepdim=True).float(), logits.gather(1, target).float()
            p = torch.softmax(logits, 1, dtype=torch.float32, out=probabilities_buffer[: len(hidden_part)])
            # torch's softmax sums V terms sequentially; its rounding error shows in p's sum (pairwise): divide by it.
            sums = p.sum(1, keepdim=True)
            losses = largest - p.amax(1, keepdim=True).log() + sums.log() - target_logit
            scale = sums.reciprocal()
            if target_losses is not None:
                target_losses[part] = losses.squeeze(1)
            if weights is not None:
                losses, scale = losses * weights[part, None], scale * weights[part, None]
            total += losses.sum()
            if not with_gradients:
                continue
            # d loss / d logits = (p - onehot * sums) * scale. The scale goes to the small factors of each product.
            if isinstance(slope, float):
                scale = scale * slope
            p.scatter_add_(1, target, -sums)
            if dtype == torch.float16:  # the tail of 150,000 probabilities would vanish
                p, scale = p.mul_(_FP16_SCALE), scale / _FP16_SCALE
            if isinstance(slope, Tensor):
                p.mul_(slope)
            d_logits = p if p.dtype == dtype else logits.copy_(p)
            scaled = hidden_part * scale.to(dtype)
            if d_bias is not None:
                d_bias.addmv_(p.t(), scale.squeeze(1))
            if low_input is not None and low_weight is not None:
                if d_low_input is not None:
                    torch.mul(d_logits @ low_weight, scale, out=d_low_input[part])
                if d_low_weight is not None:
                    d_low_weight += d_logits.t() @ (low_input[part] * scale.to(dtype))
            if rows is not None:
                d_columns = d_logits[:, token_ids]
                d_logits.index_fill_(1, token_ids, 0)
                if d_rows is not None:
                    d_rows += d_columns.t() @ scaled
            if d_hidden is not None:
                torch.mul(d_logits @ weight, scale, out=d_hidden[part])
                if rows is not None:
                    d_hidden[part].addcmul_((d_columns @ rows).float(), scale)
            if d_weight is not None:
                if dtype == torch.float32:
                    d_weight.addmm_(d_logits.t(), scaled)
                else:
                    d_weight += d_logits.t() @ scaled
        if d_bias is not None and rows is not None:
            d_bias.index_fill_(0, token_ids, 0)  # logits of replaced rows have no bias
        ctx.gradients, ctx.dtypes = gradients, [None if x is None else x.dtype for x in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        # Scaled in place, so once only; and before fp16 sees them, where unscaled ones would vanish.
        gradients, ctx.gradients = ctx.gradients, None
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return None, None, *(None if g is None else g.mul_(grad_output).to(dtype) for g, dtype in pairs)
