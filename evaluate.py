"""Compare models on held-out conversations and tasks: python evaluate.py MODEL|ADAPTER ... --data EVAL.json.

Flags: inference/evaluate.py. They are not here because this file is not installed: in site-packages it would clash
with the library named evaluate, which lm-eval needs.
"""

from inference.evaluate import run_script

if __name__ == "__main__":
    run_script()
