"""More than one device: one program over a mesh of them, or many workers of a Ray cluster."""
