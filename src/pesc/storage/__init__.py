"""Files: JSON, weights, atomic folders, hashes, comparison, downloads. Nothing here knows a model."""
