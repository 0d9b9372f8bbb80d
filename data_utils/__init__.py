"""Conversation files to training batches. Knows nothing of models beyond a tokenizer."""
