"""Training cells: a model of a known shape, a LoRA method and a length. Nothing here needs torch.

random_models.py makes and plans their models, arms.py trains them.
"""

from dataclasses import dataclass
from typing import Any

# 8b is Qwen3-8B; the others are the first Qwen's.
SHAPES: dict[str, dict[str, int]] = {
    "1.8b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "heads": 16, "vocab": 151_936},
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "heads": 32, "vocab": 151_936},
    "8b": {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "heads": 32, "vocab": 151_936,
        "key_heads": 8, "head_dim": 128,
    },
    "14b": {"hidden_size": 5120, "intermediate_size": 13_696, "num_hidden_layers": 40, "heads": 40, "vocab": 152_064},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "heads": 8, "vocab": 32_000},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 2, "vocab": 512},
    "tiny3": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "heads": 4, "vocab": 512,
        "key_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
METHODS = ("lora", "lora_emb", "lora_tokens", "qlora_nf4", "qlora_gptq", "full")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ARMS = ("ours", "compiled", "plain", "trl")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is trained, and how long.

    length: tokens of each row. rows: of a micro-batch. micro_batches: of a step. supervised: share of the tokens.
    lean: with gradient checkpointing. warm_up, timed: steps.
    """

    shape: str
    method: str
    length: int
    rank: int = 64
    dropout: float = 0.0
    rows: int = 1
    micro_batches: int = 8
    supervised: float = 0.5
    lean: bool = False
    warm_up: int = 3
    timed: int = 8

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.rows * self.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.rows_per_step * self.length

    @property
    def targets_per_row(self) -> int:
        """Supervised tokens: the last ones. The first of a row has nothing before it, so is none."""
        return min(round(self.supervised * self.length), self.length - 1)
