"""Batch files to try: `python -m examples.make KIND`."""
