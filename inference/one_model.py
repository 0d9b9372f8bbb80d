"""One loaded model in the place of transformers' manager of models."""

import time
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager


class OneModel(ModelManager):
    """transformers' manager of models, with one that is loaded already and stays."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self._created = int(time.time())

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, whatever is named."""
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model, in OpenAI's form."""
        return [{"id": self.name, "object": "model", "created": self._created, "owned_by": "local"}]

    def shutdown(self) -> None:
        """Nothing: the model stays until the program ends."""
