"""The harvest: one streaming pass over text that collects what an atlas holds."""
