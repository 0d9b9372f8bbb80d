"""Whether gradients reach everything that trains, seen in one step."""

import torch
from torch.distributed.tensor import DTensor

from tuning.distributed.processes import raise_on_all_ranks


class GradientCheck:
    """Sees whether gradients reach all parameters in the step that follows."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        self._parameters = parameters
        self._without = set(parameters)
        self._hooks = [
            parameter.register_hook(lambda _, name=name: self._without.discard(name))
            for name, parameter in parameters.items()
            if not isinstance(parameter, DTensor)  # FSDP2 computes with the unsharded parameter, then sets .grad here
        ]

    def finish(self) -> None:
        """All ranks must call this. Raises: MachineError: a parameter got no gradient on some rank."""
        for hook in self._hooks:
            hook.remove()
        without = sorted(name for name in self._without if self._parameters[name].grad is None)
        fault = None
        if without:
            fault = (
                f"no gradient reached {without[0]} and {len(without) - 1} more of {len(self._parameters)} trained "
                "tensors: the model, or a kernel of its quantised layers, detaches them from the graph; choose other "
                "--lora_target_modules"
            )
        raise_on_all_ranks(fault)
