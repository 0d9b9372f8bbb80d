"""Errors that users see as one line."""


class SettingsError(ValueError):
    """A setting that cannot work or would be ignored. The message names it and the way out."""


class MachineError(RuntimeError):
    """The machine could not do it (memory, say). The message says what was running and what to change first.

    agreed: every process of the run raises the same, so that one of them is enough to say it.
    """

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed
