"""Fiddler (arXiv 2402.07033): experts that do not fit the accelerator stay on the host, which computes or streams them."""
