"""Checkpoint to answers."""

import tuning  # quietens what optional libraries say at import  # noqa: F401
