"""What a run will take, before its weights load: memory, operations, time."""
