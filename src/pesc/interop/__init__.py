"""Models in and out: import published checkpoints, export to other formats, verify that files are complete."""
