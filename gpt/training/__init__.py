"""The trainer and its parts: optimizer, schedule, checkpoints, metrics, report."""
