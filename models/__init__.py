"""SASRec, the pruned LLaMA recommender and their losses. Nothing here reads a flag, prints or names a device."""
