"""Top-k lists and folders for others, from finished runs."""
