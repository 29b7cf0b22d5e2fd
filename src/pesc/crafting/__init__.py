"""How a dense model becomes a crafted one: load it, find its FFNs, add experts, save and load the result."""
