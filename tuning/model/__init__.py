"""The model that trains: loading, base or chat, LoRA, token rows, quantised layers, attention, packing, loss."""
