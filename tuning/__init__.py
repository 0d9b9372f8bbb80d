"""Model to checkpoint. Knows nothing of files of conversations."""

import logging

# Optional libraries announce at import what this machine lacks (kernels for other GPUs); nobody can act on it.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
