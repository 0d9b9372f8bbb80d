"""What the processes of a run do together: meet, agree, shard weights."""
