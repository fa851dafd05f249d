"""Text: records, tokenised examples, batches, scores and generation of causal language models."""
