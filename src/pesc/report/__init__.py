"""Results: their schema, what they say in words, charts, and the page."""
