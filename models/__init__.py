"""SASRec, the pruned LLaMA recommender and their losses.

Nothing here prints, parses a command line or names a device.
"""
