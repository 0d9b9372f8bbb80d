"""How far a model is from the one it began as, on given tokens: losses of both, and KL(model || start).

An adapter's start is the model without it. Of full training what the start said is kept: for each token its loss and
its likeliest tokens; the others count as one, so that the KL is at most that over all tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NUM_LIKELIEST = 64
LogProbabilities = Callable[[Tensor], Tensor]  # hidden states [n, H] -> [n, V] float32


class Start(NamedTuple):
    """What a model said of N tokens when it began: loss [N], its likeliest tokens [N, k] and their logs [N, k]."""

    losses: Tensor
    likeliest: Tensor
    logs: Tensor


def keep_start(hidden: Tensor, targets: Tensor, log_probabilities: LogProbabilities, chunk: int) -> Start:
    """What a model says of tokens. Shapes: hidden [N, H], targets [N]. chunk: tokens whose logits exist at a time."""
    parts = []
    for part in _parts(len(targets), chunk):
        logs = log_probabilities(hidden[part])
        values, ids = logs.topk(min(NUM_LIKELIEST, logs.shape[1]))
        parts.append((-logs.gather(1, targets[part, None]).squeeze(1), ids, values))
    return Start(*(torch.cat(each) for each in zip(*parts, strict=True)))


def compare_with_start(
    hidden: Tensor, targets: Tensor, log_probabilities: LogProbabilities, start: Start, chunk: int
) -> Tensor:
    """Loss, the start's loss and KL of each token, [N, 3]. Shapes and chunk as in keep_start."""
    parts = []
    for part in _parts(len(targets), chunk):
        logs = log_probabilities(hidden[part])
        ours, theirs = _with_rest(logs.gather(1, start.likeliest[part])), _with_rest(start.logs[part])
        parts.append(_columns(logs, targets[part], start.losses[part], (ours.exp() * (ours - theirs)).sum(1)))
    return torch.cat(parts)


def compare_with_base(
    hidden: Tensor,
    base_hidden: Tensor,
    targets: Tensor,
    log_probabilities: LogProbabilities,
    base_log_probabilities: LogProbabilities,
    chunk: int,
) -> Tensor:
    """Loss, the base's loss and KL of each token, [N, 3]. Shapes and chunk as in keep_start."""
    parts = []
    for part in _parts(len(targets), chunk):
        logs, base = log_probabilities(hidden[part]), base_log_probabilities(base_hidden[part])
        base_losses = -base.gather(1, targets[part, None]).squeeze(1)
        parts.append(_columns(logs, targets[part], base_losses, (logs.exp() * (logs - base)).sum(1)))
    return torch.cat(parts)


def _parts(number: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, max(number, 1), max(chunk, 1)))


def _columns(logs: Tensor, targets: Tensor, start_losses: Tensor, divergence: Tensor) -> Tensor:
    losses = -logs.gather(1, targets[:, None]).squeeze(1)
    return torch.stack([losses, start_losses, divergence.clamp(min=0)], 1)


def _with_rest(logs: Tensor) -> Tensor:
    """Logs of some tokens' probabilities, and of what they leave to all others. Shapes: [n, k] -> [n, k + 1]."""
    rest = (1 - logs.exp().sum(1, keepdim=True)).clamp(min=1e-9).log()
    return torch.cat([logs, rest], 1)
