"""How the package meets other models and other tools."""
