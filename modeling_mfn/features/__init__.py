"""Questions to a trained model: its features, their atlas, labels and attributions."""
