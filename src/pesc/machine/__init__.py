"""The machine that runs: memory, the C library's allocator, oneDNN, other libraries' messages."""
