"""Values over conversations, with standard errors, and differences of two models on the same conversations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LARGEST_LOSS = 700.0  # its exponential is still a number


@dataclass(frozen=True)
class Estimate:
    """A value over N conversations.

    influence: [N] float64, by how much each conversation moves the value: their sum is 0, and over another sample of
        conversations the value would vary as their sum does.
    """

    value: float
    influence: NDArray[np.float64]

    @property
    def standard_error(self) -> float:
        """sqrt(N / (N - 1) * sum of influence squared); of one conversation not a number."""
        num = len(self.influence)
        return math.sqrt(num / (num - 1) * float(np.square(self.influence).sum())) if num > 1 else math.nan


class Plain(NamedTuple):
    """A value of which it is not known what each conversation has in it. standard_error: NaN where it is not known."""

    value: float
    standard_error: float


Value = Estimate | Plain


def estimate_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum(y) / sum(d) over conversations, as a loss per token is: y its summed loss, d its tokens. d = 1: a mean.

    influence = (y - value * d) / sum(d), so that the standard error is that of a ratio estimator with conversations
    as its clusters: sqrt(N / (N - 1) * sum((y - value * d)^2)) / sum(d).

    Source: W. Cochran, Sampling Techniques (1977), 6.4.
    Example: [2, 6], [1, 3] -> 2.0
    """
    y, d = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    value = float(y.sum() / d.sum()) if d.sum() else math.nan
    return Estimate(value, (y - value * d) / d.sum() if d.sum() else np.full(len(d), math.nan))


def estimate_perplexity(loss: Estimate) -> Estimate:
    """exp(loss), its influence by the derivative."""
    value = math.exp(min(loss.value, _LARGEST_LOSS))
    return Estimate(value, value * loss.influence)


def estimate_mean(values: Sequence[float]) -> Estimate:
    """The mean of a value that each conversation has."""
    return estimate_ratio(values, [1] * len(values))


def subtract(value: Value, first: Value) -> Value:
    """By how much a model is above the first one on the same conversations.

    The influences are subtracted conversation by conversation, so what makes one hard for both does not count.
    """
    if isinstance(value, Plain) or isinstance(first, Plain):
        return Plain(value.value - first.value, math.nan)
    return Estimate(value.value - first.value, value.influence - first.influence)
