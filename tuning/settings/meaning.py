"""What an option means beyond its value, declared with the option."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Meaning:
    """What an option means to the checks, to a resumed run, and to DeepSpeed's file.

    trajectory: it changes the trained weights, so a resumed run must use the value its checkpoint was trained with.
    needs: the option it depends on: "NAME" (must be set) or "NAME VALUE|VALUE" (must have one of the values); else an
    error.
    at_least, above, below: bounds of its value.
    refused: why any value but the default is an error.
    deepspeed: the key of DeepSpeed's JSON that says the same.
    aliases: names in older scripts.
    """

    trajectory: bool = False
    needs: str | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    refused: str | None = None
    deepspeed: str | None = None
    aliases: tuple[str, ...] = ()


def option(
    help: str, *, default: Any = dataclasses.MISSING, argument: dict[str, Any] | None = None, **meaning: Any
) -> Any:
    """Declare an option as a dataclass field. argument: more of argparse's add_argument; meaning: fields of Meaning."""
    metadata = {"help": help, **(argument or {}), "meaning": Meaning(**meaning)}
    return dataclasses.field(default=default, metadata=metadata)
