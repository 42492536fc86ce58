"""One call of `generate`: the request, the loop and its rounds."""
