"""What failed in training, in one line."""

from typing import Any

from tuning.messages import name_conversations


def describe_lost_process(error: BaseException) -> str | None:
    """One line if an error says that another process of the run is gone, else None."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"a data loader process died ({text.splitlines()[0]}); if memory ran out, lower --dataloader_num_workers"
    if any(words in text for words in ("Connection closed by peer", "Connection reset by peer", "remote process exit")):
        return (
            "the connection to another process of this run broke; it has ended: its own message says why, or it was "
            "killed without one (for memory, say)"
        )
    return None


def describe_out_of_memory(micro_batch: Any, row_ids: list[str], *, batch_size: int, checkpointing: bool) -> str:
    """Which micro-batch did not fit, and what to change first. batch_size: --per_device_train_batch_size."""
    rows, width = micro_batch["input_ids"].shape
    size = f"{rows} rows x {width} tokens"
    if "lengths" in micro_batch:
        size = f"{len(micro_batch['lengths'])} rows, {width} tokens"
    first = "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps to keep the step)"
    if batch_size == 1:
        first = "lower --model_max_length" if checkpointing else "pass --gradient_checkpointing True"
    elif not checkpointing:
        first += ", or pass --gradient_checkpointing True"
    return f"out of memory in a micro-batch of {size} (conversations {name_conversations(row_ids)}); {first}"
