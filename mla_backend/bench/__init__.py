"""`mla-bench` and `mla-bench-engine`: this project's kernel and its peers, alone and in whole decode steps of vLLM."""
