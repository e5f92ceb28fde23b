"""A resumable trainer: DDP/FSDP2, EMA, schedules, atomic checkpoints, collapse monitor."""
