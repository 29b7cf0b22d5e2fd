"""Speed and memory, side by side: `pesc bench`."""
