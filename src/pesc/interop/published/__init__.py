"""The layouts of the published checkpoints (Camelidae, Qwen2idae, Sparsetral): read, and written."""
