"""Server of the explorer: what needs the model, and who may ask for it."""
