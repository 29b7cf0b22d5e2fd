"""A fuzzer: every kind of folder that is read, damaged in every way, through every verb."""
