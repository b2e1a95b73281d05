"""Data of the four steps.

This package shadows Hugging Face's `datasets` library on purpose: the released code has a folder of
this name and its users know it. `transformers` believes the library to be installed when it finds
the name, so nothing here may use `transformers.Trainer`; models, tokenizers and schedules never
look. `tests/test_layout.py` holds this.
"""
