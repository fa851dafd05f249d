"""The embedded tiny world: drawn scenes, captions, an exact verifier, tastes, and tiny base models.

Nothing here needs a download. `scenes` draws and captions, `verifier` reads a picture back, `taste` turns readings
into preferences, `codec` is the closed-form autoencoder, and `bases` locates the tiny models shipped with the package.
"""
