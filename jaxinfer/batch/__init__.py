"""OpenAI batch files: rows, journal, runner, report, the jaxinfer-batch command."""
