"""Which layers of a model may stream, and what it costs in quality."""
