"""What a run reports: meters, sinks (console, JSONL) and plots."""
