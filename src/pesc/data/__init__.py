"""Conversations: files, chat templates, what is trained on."""
