"""The embedded text world: small puzzles with an exact verifier, memorised facts, and a tiny causal LM that knows both.

Nothing here needs a download. `task` poses puzzles and reads answers, `facts` holds what can be forgotten, `corpus` is
what the tiny LM was trained on, `lm` builds and loads it, `sampling` draws answers, `datasets` writes training data,
and `measure` says how good a model is.
"""
