"""What an option means beyond its value, declared with the option."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Meaning:
    """What an option means to the checks, to a resumed run, to DeepSpeed's file, and to the help.

    trajectory: it changes the trained weights, so a resumed run must use the value its checkpoint was trained with.
    needs: the option it depends on: "NAME" (must be set) or "NAME VALUE|VALUE" (must have one of the values); else an
    error.
    at_least, above, below: bounds of its value.
    deepspeed: the key of DeepSpeed's JSON that says the same.
    aliases: names in older scripts.
    choices: the values it may have, where the type does not say it.
    shown: the default in words, where the value alone does not say it.
    main: it is in the short help.
    section: the heading of the help that begins with this option.
    """

    trajectory: bool = False
    needs: str | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    deepspeed: str | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    shown: str | None = None
    main: bool = False
    section: str | None = None


def option(help: str, *, default: Any = dataclasses.MISSING, **meaning: Any) -> Any:
    """Declare an option as a dataclass field. meaning: fields of Meaning."""
    return dataclasses.field(default=default, metadata={"help": help, "meaning": Meaning(**meaning)})


def list_meanings(group: Any) -> dict[str, Meaning]:
    """The meaning of every option of a group: one of options.GROUPS, or an instance."""
    fields = dataclasses.fields(group)
    return {field.name: field.metadata["meaning"] for field in fields if "meaning" in field.metadata}
