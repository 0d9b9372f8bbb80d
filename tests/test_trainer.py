"""What StepTrainer takes over from transformers' Trainer."""

import hashlib
import inspect

import pytest
import transformers
from transformers import Trainer

from tuning.training.trainer import OVERRIDDEN, StepTrainer

# The first digits of the hashes of their source, in versions that all tests passed with.
TESTED = {
    "5.23.0": {
        "_determine_best_metric": "7aa77355a0c3",
        "_get_grad_norm": "913ba6f52f07",
        "_init_training_state": "8fbd17ebb7d3",
        "_load_best_model": "0e183d55a9db",
        "_load_from_checkpoint": "a2804e8d93a2",
        "_load_rng_state": "d5ebdfc0a088",
        "_prepare_for_training": "f55950593d7e",
        "_run_epoch": "31aff00f34c3",
        "_save_checkpoint": "a9111e30faa9",
    },
    "5.17.0": {
        "_determine_best_metric": "7aa77355a0c3",
        "_get_grad_norm": "913ba6f52f07",
        "_init_training_state": "8fbd17ebb7d3",
        "_load_best_model": "0e183d55a9db",
        "_load_from_checkpoint": "4711d0506786",
        "_load_rng_state": "d5ebdfc0a088",
        "_prepare_for_training": "0a4d89b3fdfd",
        "_run_epoch": "ebe374933064",
        "_save_checkpoint": "a9111e30faa9",
    },
}


def test_the_list_of_overridden_private_methods_is_complete():
    own = {name for name in vars(StepTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own & set(dir(Trainer)) == OVERRIDDEN.keys()
    assert all(len(reason) > 20 for reason in OVERRIDDEN.values())


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_transformers_has_not_changed_what_is_overridden(name):
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers {transformers.__version__} has no Trainer.{name} to override any more"
    found = hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:12]
    assert found in {hashes[name] for hashes in TESTED.values()}, (
        f"transformers {transformers.__version__} has changed Trainer.{name}, which StepTrainer overrides because "
        f"{OVERRIDDEN[name]}; compare them, then add {found} here"
    )
