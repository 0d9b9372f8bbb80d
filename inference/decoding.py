"""Settings of decoding that a user may change, and their bounds. Standard library only."""

from collections.abc import Mapping
from typing import Any

from tuning.errors import SettingsError

# Type, least and largest value. Beyond them logits overflow, or no token is left to choose.
SETTINGS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100),
    "top_p": (float, 0.001, 1),
    "top_k": (int, 0, 1_000_000),
    "repetition_penalty": (float, 0.01, 100),
    "max_new_tokens": (int, 1, 1_000_000),
}
_LEAST_TEMPERATURE = 0.001  # but for 0, which takes the likeliest token


def read_setting(name: str, text: str) -> int | float:
    """The value of a setting. Raises: SettingsError: no number, or out of its bounds."""
    kind, least, largest = SETTINGS[name]
    try:
        value: int | float = kind(text)
    except ValueError:
        raise SettingsError(f"expected {name}=NUMBER") from None
    if not least <= value <= largest:  # NaN is in no range
        raise SettingsError(f"must be from {least:g} to {largest:g}")
    if name == "temperature" and 0 < value < _LEAST_TEMPERATURE:
        raise SettingsError(f"must be 0, or at least {_LEAST_TEMPERATURE:g}")
    return value


def choose_options(settings: Mapping[str, int | float], *, samples: bool) -> dict[str, Any]:
    """Settings as generate takes them. samples: whether the model samples by itself.

    Example: {"temperature": 0, "top_p": 0.5} -> {"do_sample": False, "temperature": None}
    """
    options: dict[str, Any] = dict(settings)
    if "temperature" in options:
        options["do_sample"] = options["temperature"] > 0
    elif not samples and ("top_p" in options or "top_k" in options):
        options["do_sample"] = True
    if options.get("do_sample", samples) is False:  # the likeliest token is in every choice of tokens
        options = {name: value for name, value in options.items() if name not in ("top_p", "top_k")}
        options["temperature"] = None
    return options
