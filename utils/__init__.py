"""Flags, training and evaluation: what a researcher edits beside `models/`."""
