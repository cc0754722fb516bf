"""Finished models: a card (JSON, in RobustBench's form) and its weights (safetensors) for each."""
