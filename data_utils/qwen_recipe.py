"""Labels of the original Qwen recipe (--label_mask qwen).

One row of the whole rendering. Assistant turns are trained, and <|im_start|>, <|im_end|> and the line end after it in
every turn; role names and the contents of other roles are not.

Source: QwenLM/Qwen finetune.py `preprocess`.
"""

from data_utils.rows import IGNORE_INDEX, Row
from data_utils.safe_encoder import SafeEncoder
from data_utils.schema import Conversation
from data_utils.sources import DataError


def check_conversation(conversation: Conversation) -> None:
    """Refuse what the recipe cannot train. Raises: DataError: tools, or turns with weights."""
    if conversation.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in conversation.messages):
        raise DataError(f"{conversation.where}: --label_mask qwen knows no tools; use --label_mask assistant")
    if any(weight != 1 for weight in conversation.weights.values()):
        raise DataError(f"{conversation.where}: --label_mask qwen trains every turn alike; use --label_mask assistant")


def label_rendering(rendered: str, encoder: SafeEncoder) -> Row:
    """Encode and label the rendering of a whole conversation; user texts in it are escaped."""
    start, end = (encoder.control_ids[token] for token in ("<|im_start|>", "<|im_end|>"))
    newline = encoder.encode("\n")
    before, *blocks = rendered.split("<|im_start|>")
    row = Row(encoder.encode(before), [], [])
    row.labels = [IGNORE_INDEX] * len(row.input_ids)
    for block in blocks:
        role, _, rest = block.partition("\n")
        header = [start, *encoder.encode(role), *newline]
        body = encoder.encode(rest)
        if role == "assistant":
            trained = body
        else:
            content = body.index(end) if end in body else len(body)
            trained = [IGNORE_INDEX] * content + body[content:]
        row.input_ids += header + body
        row.labels += [start] + [IGNORE_INDEX] * (len(header) - 1) + trained
        if role == "assistant":
            row.ends.append(len(row.input_ids))
            row.weights.append(1.0)
        row.pieces.append((len(row.input_ids), f"{role}, by the original Qwen recipe"))
    return row
