"""Low-bit weights and activations: packed arrays, and how they are found from a model and text (Atom, arXiv 2310.19102)."""
