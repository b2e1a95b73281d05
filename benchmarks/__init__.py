"""Speed and memory, each figure ours beside the plain form in the same run."""
