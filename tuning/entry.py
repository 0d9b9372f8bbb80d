"""The way every entry script ends: one line for a mistake, and an exit code."""

import argparse
from typing import NoReturn

from tuning.errors import SettingsError


class OneLineParser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what the entry scripts print."""
        raise SettingsError(f"{message}; see --help")
