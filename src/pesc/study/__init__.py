"""Studies: arms by seeds, each run trained and measured once."""
