"""Where a result can be served as it is, and where it must be merged first."""

from typing import Any


def describe_serving(training_model: Any, *, quantized: bool, resized_to: int | None = None) -> dict[str, Any]:
    """What a server can take, for run.json and the end of the log.

    Servers that load adapters beside the base (vLLM) take low-rank products of linear layers only: they refuse
    vocabulary rows and whole matrices (vllm issues 36501, 9280), and know adapters of experts in other forms than
    peft's. A result without an adapter loads everywhere.

    training_model: a TrainingModel. quantized: whether the adapter was trained on quantised weights. resized_to: rows
    that a base needs for the adapter's new tokens.

    Returns: {"as_it_is": where the directory can be served, "merge_first": why it must be merged elsewhere, or None}.
    """
    peft_config = getattr(training_model.model, "peft_config", None)
    if peft_config is None:
        return {"as_it_is": "transformers and servers", "merge_first": None}
    config = peft_config["default"]
    if why := find_obstacles(config, has_rows=training_model.token_rows is not None):
        where = "peft" if resized_to is None else f"peft, after base.resize_token_embeddings({resized_to})"
        return {"as_it_is": where, "merge_first": why}
    if quantized:
        return {"as_it_is": "peft, on the same quantised base", "merge_first": "it was trained on quantised weights"}
    return {"as_it_is": f"peft, and servers that load adapters of rank {config.r}", "merge_first": None}


def find_obstacles(config: Any, *, has_rows: bool) -> str | None:
    """Why servers that load adapters refuse one, by its configuration. has_rows: whether it has vocabulary rows."""
    obstacles = []
    if has_rows:
        obstacles.append("vocabulary rows")
    if config.modules_to_save:
        obstacles.append("whole matrices")
    if config.use_dora:
        obstacles.append("DoRA")
    if config.target_parameters:
        obstacles.append("adapters of experts")
    if config.bias != "none":
        obstacles.append("biases")
    return f"it holds {' and '.join(obstacles)}, which servers that load adapters refuse" if obstacles else None
