"""The Trainer and what it uses in a step."""
