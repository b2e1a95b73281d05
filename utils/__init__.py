"""Things any training repository needs; nothing here knows what SLMRec is."""
