"""Reading GGUF files: as a file, and as the model that it stands for."""
