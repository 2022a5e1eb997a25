"""Labels for features: automatic ones from what features fire on, and descriptions by a language model."""
