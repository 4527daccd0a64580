"""GGUF, the file of llama.cpp: one file that holds weights, metadata and tokenizer."""
