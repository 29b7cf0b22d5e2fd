"""The demo: craft, train and examine a small mixture of experts on one machine."""
