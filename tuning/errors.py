"""Errors that users see as one line."""


def name_rows(row_ids: list[str]) -> str:
    """The first rows by their ids, and how many more there are."""
    return ", ".join(row_ids[:8]) + (f" and {len(row_ids) - 8} more" if len(row_ids) > 8 else "")


def first_line(error: Exception) -> str:
    """Of its message; the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class SettingsError(ValueError):
    """A setting that cannot work or would be ignored. The message names it and the way out."""


class MachineError(RuntimeError):
    """The machine could not do it (memory, say). The message says what was running and what to change first.

    agreed: every process of the run raises the same, so that one of them is enough to say it.
    """

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed
