"""Model to checkpoint. Knows nothing of files of conversations. Importing it costs no library."""

import logging
import os
import sys
import warnings

# Optional libraries announce at import what this machine lacks (kernels for other GPUs); nobody can act on it.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree", "huggingface_hub"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# transformers renamed gradient_checkpointing; both names work here, and peft still asks for the old one.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
# peft, of an adapter whose base was moved; which base it is, is checked here by its weights.
warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
# accelerate passes what it is given on under a name that torch has renamed.
warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
# DeepSpeed calls functions of torch.distributed by their old names.
warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
_GPUS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, WSL's
if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not any(map(os.path.exists, _GPUS)):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed looks for GPUs when it is imported, and says so
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers follows it
