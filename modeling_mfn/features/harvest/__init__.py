"""The harvest: one streaming pass over text that gathers what an atlas holds."""
