"""Data: one reader per data set layout, the canonical record, the source resolver, and the latent/text cache."""
