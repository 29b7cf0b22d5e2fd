"""Looking at a finished run: what it learned, where its tokens went, and a page that says so."""
