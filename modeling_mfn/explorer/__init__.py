"""The explorer: features of a model in a browser, as a folder that opens from disk or as a server."""
