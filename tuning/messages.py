"""Texts that several messages share."""

RESUME_HINT = "resume with the same command and --resume_from_checkpoint auto"


def name_conversations(row_ids: list[str]) -> str:
    """The first rows by their ids, and how many more there are."""
    return ", ".join(row_ids[:8]) + (f" and {len(row_ids) - 8} more" if len(row_ids) > 8 else "")


def first_line(error: Exception) -> str:
    """First line of the error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
