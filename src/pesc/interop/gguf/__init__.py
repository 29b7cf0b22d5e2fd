"""GGUF files for llama.cpp: writer and vocabulary."""
