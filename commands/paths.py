"""What can be said of paths and data before torch and transformers are imported."""

from collections.abc import Iterator
from pathlib import Path

from data_utils.conversations import DataOptions, check_first_rows, read_names
from data_utils.hub import choose_hub, explain_missing_on_modelscope, fetch_model
from data_utils.hub_data import find_data
from data_utils.model_path import explain_missing_model, explain_unreachable_model, find_template
from data_utils.new_tokens import read_new_tokens
from data_utils.sources import DataError
from tuning.checkpoint.output_directory import check_run_directory
from tuning.console import is_rank_0
from tuning.errors import SettingsError, read_json_object
from tuning.settings.options import DataArguments, Settings


def find_model(path: str, hub: str | None, cache_dir: str | None = None, *, allow_pickle: bool = False) -> str:
    """A model as libraries take it: a directory, or a name of the Hugging Face hub; from ModelScope it is downloaded.

    hub: of the command line, or None.

    Raises: SettingsError: neither a directory nor a hub name, or a hub that cannot be reached. DataError: a download
    that failed.
    """
    if mistake := _explain_model(path, cache_dir, hub):
        raise SettingsError(mistake)
    if hub and Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
        raise SettingsError(f"--hub {hub}: has no effect, as {path} is a directory")
    return fetch_model(path, hub=hub, cache_dir=cache_dir, allow_pickle=allow_pickle)


def find_adapter_base(
    path: str, base: str | None, hub: str | None, cache_dir: str | None = None, *, allow_pickle: bool = False
) -> str | None:
    """Check an adapter's directory and its base model. base: where it is named; else the adapter says it.

    Returns: the base, if it was named or had to be downloaded from ModelScope.

    Raises: SettingsError: no such directory, no adapter in it, or a base model that is not there.
    """
    if mistake := _explain_adapter(path):
        raise SettingsError(mistake)
    named = base or read_json_object(Path(path) / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or (not base and Path(named).is_dir()):
        return base
    if mistake := _explain_model(named, cache_dir, hub):
        raise SettingsError(mistake if base else f"{mistake}; it is the adapter's base model: name it with --base")
    found = fetch_model(named, hub=hub, cache_dir=cache_dir, allow_pickle=allow_pickle)
    return found if base or found != named else None


def find_missing_paths(settings: Settings) -> Iterator[str]:
    """Hold the paths of a run against the disk. Yields: a line for each mistake, with the flags it is about.

    Of several processes the first one does so; what another machine lacks is found when they read it.
    """
    if not is_rank_0():
        return
    model, data, lora, run = settings
    if model.model_name_or_path and (mistake := _explain_model(model.model_name_or_path, model.cache_dir, model.hub)):
        yield f"--model_name_or_path {mistake}"
    if model.hub and Path(model.model_name_or_path).is_dir():
        yield f"--hub {model.hub}: has no effect, as --model_name_or_path is a directory"
    general = [run.general] if run.general else None
    for name, paths in (("data_path", data.data_path), ("eval_data_path", data.eval_data_path), ("general", general)):
        for path in paths or ():
            try:
                find_data([path], weighted=name == "data_path")
            except DataError as error:
                yield f"--{name} {error}"
    for name, file in (
        ("chat_template", data.chat_template and str(find_template(data.chat_template))),
        ("sample_prompts", run.sample_prompts),
        ("deepspeed", run.deepspeed),
    ):
        if file is not None and not Path(file).is_file():
            yield f"--{name} {file}: {'is a directory' if Path(file).is_dir() else 'no such file'}"
    if data.add_special_tokens:
        try:
            read_new_tokens(data.add_special_tokens)
        except DataError as error:
            yield str(error)
    if lora.lora_weight_path and (mistake := _explain_adapter(lora.lora_weight_path)):
        yield f"--lora_weight_path {mistake}"
    if run.output_dir:
        try:
            check_run_directory(settings)
        except SettingsError as error:
            yield str(error)


def _explain_model(path: str, cache_dir: str | None, hub: str | None) -> str | None:
    explain = explain_missing_on_modelscope if choose_hub(hub) == "modelscope" else explain_unreachable_model
    return explain_missing_model(path) or explain(path, cache_dir)


def _explain_adapter(path: str) -> str | None:
    if not Path(path).is_dir():
        return f"{path}: no such directory"
    return None if (Path(path) / "adapter_config.json").is_file() else f"{path}: no adapter_config.json in it"


def read_options(data: DataArguments, *, seed: int) -> DataOptions:
    """How data files become rows. seed: of samples."""
    return DataOptions(
        max_length=data.model_max_length,
        on_long=data.on_long,
        data_format=data.data_format,
        supervise=data.supervise,
        on_bad_row=data.on_bad_row,
        seed=seed,
        names=read_names(data.map or ()),
    )


def check_data(settings: Settings) -> None:
    """Look at the first rows of all data. Raises: DataError: all rows that cannot be read, if one is among them."""
    data, run = settings.data, settings.run
    if is_rank_0():
        seed = run.seed if run.data_seed is None else run.data_seed
        check_first_rows([*data.data_path, *(data.eval_data_path or [])], read_options(data, seed=seed))
