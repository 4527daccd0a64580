"""How perplexity is counted; figures of two protocols never compare.

- `gptq`: joined text, cut into windows that do not overlap; every token of a window but the first is predicted from
  those before it in the window. The harnesses of GPTQ, OmniQuant and EfficientQAT count the same tokens.
- `llama.cpp`: the tool llama-perplexity. The first token of every window is replaced by bos where the tokenizer puts
  one before a text, and only the second half of a window is scored: of 512 tokens the last 255.
- `lm-eval`: the harness's (harness.py): whole documents, per word and per byte.
"""

WINDOWS = {"gptq": 2048, "llama.cpp": 512}  # the usual seqlen of the protocols that have windows
PROTOCOLS = (*WINDOWS, "lm-eval")
