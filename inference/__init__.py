"""Checkpoint to answers."""

from typing import TYPE_CHECKING

import tuning  # quietens what optional libraries say at import  # noqa: F401

if TYPE_CHECKING:
    from inference.chat_model import ChatModel


def load(
    model: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    bits: int | None = None,
    device_map: str | None = None,
    kv_cache: str = "full",
    hub: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> "ChatModel":
    """Load a model or an adapter as chat.py does.

    The parameters are chat.py's flags.

    Raises: DataError, SettingsError: what chat.py would say.

    Example: load("output/demo").chat([{"role": "user", "content": "Hi"}]).text -> "Hello!"
    """
    # An entry, as chat.py is: what is below it knows nothing of commands.
    from commands.loading import load_answering
    from commands.model_flags import add_model_flags, find_named_model
    from inference.chat_model import ChatModel
    from tuning.entry import OneLineParser

    flags = {"base": base, "dtype": dtype, "bits": bits, "device_map": device_map, "kv_cache": kv_cache, "hub": hub}
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    words += [f"--{name}" for name, value in trust.items() if value]
    parser = OneLineParser()
    add_model_flags(parser)
    args = parser.parse_args([*words, "--", str(model)])
    find_named_model(args)
    loaded = load_answering(args)
    return ChatModel(
        loaded.model, loaded.tokenizer, system_message=loaded.system_message, kv_cache=kv_cache, kept=loaded.kept
    )
