"""`mla-bench`: this project's kernel and its peers, side by side in one run."""
