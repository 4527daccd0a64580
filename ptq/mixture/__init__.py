"""Which llama.cpp type each tensor of a file gets: by recipe, or by measurement under a limit on the size."""
