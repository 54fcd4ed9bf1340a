"""Hugging Face to jaxinfer: family tables, streaming reader, the jaxinfer-convert command."""
