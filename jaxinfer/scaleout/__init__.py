"""More than one device: one program over a mesh of them."""
