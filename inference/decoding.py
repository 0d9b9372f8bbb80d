"""Settings of decoding that a user may change, and their bounds. Standard library only."""

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
