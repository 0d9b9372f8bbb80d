"""A model of ours as lm-eval asks models."""

from typing import Any

import torch

from data_utils.template import Message
from inference.chat_model import ChatModel


def build_lm(chat: ChatModel, batch_size: int) -> Any:
    """lm-eval's model around one that is loaded, adapters included, whose prompts are those of training.

    Chats are rendered by the template of training; texts of control tokens in them stay text. The answer's ids begin
    where generation would begin, and generation ends at the stop tokens of the model's generation config. Prompts that
    are too long for the model lose their beginning, as everywhere in lm-eval.
    """
    from lm_eval.models.huggingface import HFLM

    template, encoder = chat.template, chat.template.encoder

    class TrainedLM(HFLM):
        """Ours are rendering, encoding, padding and the stop; the rest is lm-eval's."""

        @property
        def eot_token_id(self) -> int:
            return template.stop_id

        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            messages = template.escape_messages(template.with_system_message(chat_history))
            begun = "" if add_generation_prompt else messages.pop()["content"]  # of the answer
            return template.render(messages, add_generation_prompt=True) + begun

        def tok_encode(self, string: str, *_: Any, left_truncate_len: int | None = None, **__: Any) -> list[int]:
            return encoder.encode(string)[-(left_truncate_len or 0) :]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            prompt = encoder.encode(context)
            return prompt, encoder.encode_target(context, prompt, encoder.escape(continuation, "assistant"))

        def tok_batch_encode(
            self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            assert padding_side == "left"
            rows = [self.tok_encode(each, left_truncate_len=left_truncate_len) for each in strings]
            width = max(map(len, rows))
            ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
            for index, row in enumerate(rows):
                ids[index, width - len(row) :] = torch.tensor(row)
                mask[index, width - len(row) :] = 1
            return ids, mask

    thinks = "</think>" in str(chat.tokenizer.get_chat_template())
    return TrainedLM(
        pretrained=chat.model,
        tokenizer=chat.tokenizer,
        batch_size=batch_size,
        think_end_token="</think>" if thinks else None,
    )
