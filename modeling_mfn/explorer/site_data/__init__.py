"""Static folder of the explorer: an atlas as data that a browser reads."""
